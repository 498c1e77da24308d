"""What becomes of a command when nobody takes its output; in processes, because it is about their descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import open_bundle, write_golden, write_manifest

CODE = "import sys; from edgewright.edge_runtime.cli import main; sys.exit(main())"


def _shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`command` in bash, where $0 is the command line's program and $1 ... are `arguments`."""
    program = f"{sys.executable} -c '{CODE}'"
    text = f'set -o pipefail; run() {{ {program} "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", text, "run", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def failing(bundle: Path) -> Path:
    with open_bundle(bundle) as opened:
        cases, manifest = opened.golden(), opened.manifest
    cases[0].torch["scores"] = cases[0].torch["scores"] + 1
    write_golden(bundle / "golden.npz", cases)
    write_manifest(bundle, manifest)
    return bundle


def test_a_reader_that_has_seen_enough_does_not_change_the_exit_code(bundle: Path, tmp_path: Path) -> None:
    # the reader is gone before anything is written
    done = _shell('run verify "$1" 3>"$2" > >(exec true); echo $?', bundle, tmp_path / "x")
    assert done.stdout == "0\n" and done.stderr == ""


def test_a_verdict_outlives_its_reader_and_a_full_disk(failing: Path) -> None:
    for where in ("| head -c 1 >/dev/null", ">/dev/full", ">&- 2>&- <&-"):
        done = _shell(f'run verify "$1" {where}', failing)
        assert done.returncode == 3 and "internal" not in done.stderr and "Traceback" not in done.stderr, (where, done)


@pytest.mark.parametrize("command", ["verify", "predict", "--help", "verify --help"])
def test_a_full_disk_is_an_error_in_words(bundle: Path, tmp_path: Path, rows: np.ndarray, command: str) -> None:
    np.save(tmp_path / "x.npy", rows)
    arguments = {"verify": ' "$1"', "predict": ' "$1" "$2"'}.get(command, "")
    done = _shell(f"run {command}{arguments} >/dev/full", bundle, tmp_path / "x.npy")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output") and "No space left on device" in done.stderr


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2> >(exec true)"])
def test_without_standard_error_the_exit_code_still_says_it(tmp_path: Path, where: str) -> None:
    done = _shell(f'run verify "$1" {where}', tmp_path / "none")
    assert done.returncode == 2 and done.stdout == ""


def test_no_file_becomes_a_closed_standard_output(bundle: Path, tmp_path: Path) -> None:
    done = _shell('run verify "$1" --json "$2" >&-', bundle, tmp_path / "v.json")
    assert done.returncode == 0 and (tmp_path / "v.json").read_text().startswith("{")


def test_a_pipe_that_does_not_wait_gets_everything(bundle: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = (
        "import sys; from edgewright.edge_runtime.process.standard_streams import standard_streams\n"
        "with standard_streams(): print('x' * 300_000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=writing) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            assert len(stream.read()) == 300_001
    assert process.returncode == 0


def test_the_streams_of_a_caller_come_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from edgewright.edge_runtime import cli

    before: tuple[Callable[..., object], ...] = sys.stdout, sys.stderr  # type: ignore[assignment]
    assert cli.main(["verify", str(tmp_path / "none")]) == 2
    assert (sys.stdout, sys.stderr) == before and "no bundle" in capsys.readouterr().err
