"""Temporary folders on a disk without room: said, with what helps, and nobody else's error is taken for it."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import pytest

from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.process import scratch
from edgewright.edge_runtime.process.scratch import Scratch


def fill(error: Exception) -> None:
    with Scratch("test-") as folder:
        if isinstance(error, OSError) and error.filename == "here":
            error.filename = str(folder / "model.onnx")
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["here", None])
def test_a_full_disk_is_bad_input_that_names_the_place(number: int, name: str | None) -> None:
    with pytest.raises(InputError, match=r"the place for temporary files, .*, is full.*set TMPDIR"):
        fill(OSError(number, "No space left on device", name))


def test_what_foreign_code_says_of_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(InputError, match=r"is full \(18 requested and 0 written\)"):
        fill(RuntimeError("18 requested and 0 written"))


def test_other_errors_pass() -> None:
    for error in (OSError(errno.ENOSPC, "no room", "/another/disk"), RuntimeError("else"), InputError("bad")):
        with pytest.raises(type(error)) as caught:
            fill(error)
        assert caught.value is error


def test_no_place_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match=r"no temporary folder can be made.*set TMPDIR"):
        Scratch("test-")
