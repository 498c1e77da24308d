"""Files that appear whole or not at all, and where they may."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file beside `path`, which takes its place when the block ends and goes when the block fails.

    The name is used once, so that two processes may write the same file; the last one wins.

    Args:
        path: the file to write; its folder exists.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_place(path: Path, bundle: Path | None = None) -> None:
    """Refuses a place for a result before the work is done.

    Args:
        path: the file or folder to write.
        bundle: what the result is about, if it is a bundle.

    Raises:
        InputError: its folder does not exist or cannot be written, or it lies in the bundle.
    """
    try:
        folder = path.resolve().parent
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {folder}")
        if bundle is not None and bundle.is_dir() and folder.is_relative_to(bundle.resolve()):
            raise InputError(f"cannot write {path}: it lies in the bundle, which is immutable; write it beside it")
        if not os.access(folder, os.W_OK):
            raise InputError(f"cannot write {path}: the folder {folder} is not writable")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
