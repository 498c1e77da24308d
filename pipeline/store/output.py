"""The folder of a run: writable before any compute, and used by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Makes `out`, proves that it can be written, and holds its lock.

    The lock belongs to the open file, so the system releases it when the process ends in whatever way: a lock
    file left by a dead process locks nothing.

    Raises:
        OutputError: cannot be made or written, or another process uses it; names the process.
    """
    out = Path(out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"writable")
        # append, not write: the text of the process that holds the lock must survive our attempt
        lock = (out / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"results cannot be written to {out}: {error.strerror or error}; choose another folder with --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise OutputError(
                f"{out} is in use by {owner}: wait until it is done, or choose another folder with --out"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        try:
            yield out
        finally:
            lock.truncate(0)
