"""Which files a user's code reads while it makes a model or a task: a configuration beside it, arrays, a vocabulary."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .user_modules import is_installed


class _Watcher:
    """The process's audit hook: there is no way to remove one, so it is one, and idle most of the time."""

    def __init__(self) -> None:
        self.read: set[str] | None = None
        self.written: set[str] = set()
        self.installed = False

    def __call__(self, event: str, details: tuple[object, ...]) -> None:
        if self.read is None or event != "open":
            return
        path, _, flags = details
        if not isinstance(path, str | bytes | os.PathLike):
            return
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        # no resolve(): it would ask the disk, in the middle of any `open`
        (self.written if writes else self.read).add(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100


_watcher = _Watcher()


@contextmanager
def files_read(folder: Path, found: dict[Path, str]) -> Iterator[None]:
    """Adds to `found` the files below `folder` that Python opens for reading meanwhile.

    Left out are Python files (`import_closure` has those), what is installed, and files that are written as well: a log
    or a store of the user's. What a library opens without Python is not seen.

    Args:
        folder: the user's.
        found: gets resolved paths and the sha256 of what they hold at the end, also after an error; what it has already
            stays.
    """
    if not _watcher.installed:
        sys.addaudithook(_watcher)
        _watcher.installed = True
    outer, _watcher.read = _watcher.read, set()
    try:
        yield
    finally:
        seen, _watcher.read = _watcher.read or set(), outer
        if outer is not None:
            outer |= seen
        root = folder.resolve()
        written = {Path(name).resolve() for name in _watcher.written}
        for path in {Path(name).resolve() for name in seen}:
            if (
                path.is_relative_to(root)
                and path.suffix not in (".py", ".pyc")
                and path not in written
                and not is_installed(path)
                and os.access(path, os.R_OK)
                and path.is_file()
            ):
                found.setdefault(path, hashlib.sha256(path.read_bytes()).hexdigest())
