"""A Python before 3.10 says so in one line: what it reads first must be made of what it understands."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgewright.edge_runtime.bundle.archive import write_runtime_archive

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "src" / "edgewright_launch.py"
PRETEND = (
    "import runpy, sys\n"
    "class Old(tuple): major, minor, micro = 3, 8, 1\n"
    "sys.version_info = Old((3, 8, 1, 'final', 0))\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyz") / "edge_runtime.pyz"
    write_runtime_archive(path)
    return path


def first_text(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    with zipfile.ZipFile(path) as content:
        return content.read("__main__.py").decode()


@pytest.mark.parametrize("which", ["launch", "archive"])
def test_old_pythons_understand_what_they_read_first(archive: Path, which: str) -> None:
    tree = ast.parse(first_text(LAUNCH if which == "launch" else archive), feature_version=(3, 6))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(node.module != "__future__" for node in imports), "3.6 knows no annotations there"


@pytest.mark.parametrize("which", ["launch", "archive"])
def test_an_old_python_is_told_in_one_line(archive: Path, which: str) -> None:
    path = LAUNCH if which == "launch" else archive
    command = [sys.executable, "-c", PRETEND, str(path), "verify", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs Python 3.10 or newer" in done.stderr and "is 3.8" in done.stderr
