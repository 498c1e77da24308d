"""Files and folders that appear whole or not at all, and JSON with fixed bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """One line, sorted keys: equal values have equal text."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"))


def pretty_json(value: Any, *, finite: bool = False) -> str:
    """Indented JSON with sorted keys and a newline at the end.

    Args:
        value: see `plain`.
        finite: write NaN and infinities as null, for files that other programs read.
    """
    return json.dumps(plain(value, finite), sort_keys=True, indent=2, allow_nan=not finite) + "\n"


def plain(value: Any, finite: bool = False) -> Any:
    """`value` as None, bool, int, float, str, lists and string-keyed dicts.

    Paths become text, sets sorted lists, numbers and arrays of numpy and torch Python numbers and lists.

    Raises:
        TypeError: there is something in it that JSON cannot hold.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return None if finite and number - number != 0.0 else number
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, finite) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item, finite) for item in value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), finite)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r:.80}")


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`; a kill leaves either the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `target` at the end, replacing what was there; nothing on an
    error.

    Everything is on the disk before the rename, so `target` is complete whenever it exists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            _sync(path)
        _sync(aside)
        if target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written in `folder`; the caller holds the lock of the run."""
    for pattern in (".*.part", ".*.old"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
