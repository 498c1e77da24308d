"""What a user's code reads: seen through `open`, without what it writes, what is installed, and what lies elsewhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from edgewright.models.sources.files_read import files_read


def test_files_below_the_folder_that_are_read(tmp_path: Path) -> None:
    folder, found = tmp_path / "user", dict[Path, str]()
    folder.mkdir()
    for name in ("a.json", "b.txt", "log.txt", "code.py", "before.txt"):
        (folder / name).write_text("1")
    (tmp_path / "elsewhere.txt").write_text("1")
    np.save(folder / "x.npy", np.zeros(2))
    (folder / "before.txt").read_text()
    with files_read(folder, found):
        with (folder / "a.json").open() as file:
            json.load(file)
        with files_read(folder, {}):
            (folder / "b.txt").read_bytes()
        np.load(folder / "x.npy")
        (folder / "code.py").read_text()
        (tmp_path / "elsewhere.txt").read_text()
        (folder / "log.txt").read_text()
        with (folder / "log.txt").open("a") as log:
            log.write("2")
    (folder / "before.txt").read_text()
    assert {path.name for path in found} == {"a.json", "b.txt", "x.npy"}


def test_what_was_read_before_an_error_counts(tmp_path: Path) -> None:
    found = dict[Path, str]()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"), files_read(tmp_path, found):
        json.loads((tmp_path / "a.json").read_text())
    assert found == {(tmp_path / "a.json").resolve(): hashlib.sha256(b"{").hexdigest()}
