"""The entry point: our files run, and what stands in their way is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgewright_launch

SOURCE = str(Path(edgewright_launch.__file__).parent)


def launch(*arguments: str, path: list[Path] | None = None, cwd: Path | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", "import edgewright_launch; edgewright_launch.main()", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path or []), SOURCE])},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, edgewright_launch\n"
        "try:\n    edgewright_launch.main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'onnx', 'onnxruntime', 'yaml'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        env={**os.environ, "PYTHONPATH": SOURCE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "HEAVY [] 0" in done.stdout, done.stderr
    for command in ("run", "models", "cuts", "doctor", "verify", "predict", "bench", "schema"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("name", ["edgewright.py", "edgewright/__init__.py"])
def test_a_users_edgewright_is_named(tmp_path: Path, name: str, first: bool) -> None:
    shadow = tmp_path / name
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("raise RuntimeError('never run me')")
    # a regular package wins over a namespace wherever it stands on the path
    path = [tmp_path] if first else [Path(SOURCE), tmp_path]
    code, out, error = launch("--help", path=path)
    assert code == 2 and out == ""
    assert error.startswith("error: edgewright is found at") and str(shadow) in error
    assert "rename that file or folder" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["edgewright/models/__init__.py", "edgewright/export.py", "edgewright/models/net.py"])
def test_a_part_of_edgewright_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    shadow = tmp_path / name
    shadow.parent.mkdir(parents=True)
    shadow.write_text("raise RuntimeError('never run me')")
    code, _, error = launch("--help", path=[tmp_path])
    if name.endswith("net.py"):  # no package there: a folder without __init__ gives way to ours, which has one
        assert code == 0, error
    else:
        assert code == 2 and str(shadow) in error and "Traceback" not in error


@pytest.mark.slow
def test_folders_called_models_and_export_are_in_nobodys_way(tmp_path: Path) -> None:
    for name in ("models", "export", "pipeline", "edge_runtime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('never run me')")
    code, out, error = launch("run", "none.yaml", path=[tmp_path], cwd=tmp_path)
    assert code == 2 and "there is no recipe none.yaml" in error and out == ""


def test_the_same_files_by_another_way_are_ours(tmp_path: Path) -> None:
    (tmp_path / "edgewright").mkdir()
    for name in edgewright_launch.PACKAGES:
        (tmp_path / "edgewright" / name).symlink_to(Path(SOURCE, "edgewright", name).resolve())
    assert launch("--help", path=[tmp_path])[0] == 0


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "edgewright").mkdir()
    (tmp_path / "edgewright_launch.py").write_text(Path(edgewright_launch.__file__).read_text())
    for name in edgewright_launch.PACKAGES[:-1]:
        (tmp_path / "edgewright" / name).symlink_to(Path(SOURCE, "edgewright", name).resolve())
    done = subprocess.run(
        [sys.executable, "-c", "import edgewright_launch; edgewright_launch.main()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "edgewright/pipeline is missing: install edgewright again" in done.stderr
