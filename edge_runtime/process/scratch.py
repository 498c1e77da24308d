"""Temporary folders that go with the process that made them, however it ends.

A folder is removed by its maker alone: a process that was forked from it shares the object, and must not take the
files away from under the other. What a process that was killed could not remove goes with its measuring process, see
`watched`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

from ..errors import InputError

_live: dict[str, int] = {}
"""Folders that were made and not removed yet, with the id of the process that made each."""


class Scratch:
    """A temporary folder. Use it as a context manager, or call `cleanup`; at the latest it goes when Python ends.

    Attributes:
        path: the folder, which only this user can enter.
    """

    def __init__(self, prefix: str) -> None:
        """Makes the folder.

        Args:
            prefix: what its name begins with.

        Raises:
            InputError: there is no place for temporary files.
        """
        try:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
        except OSError as error:
            raise InputError(
                f"no temporary folder can be made ({error}): set TMPDIR to a folder with room that can be written"
            ) from None
        _live[str(self.path)] = os.getpid()
        self._removed = weakref.finalize(self, _remove, str(self.path), os.getpid())

    def cleanup(self) -> None:
        """Removes the folder, unless it is gone or belongs to another process."""
        self._removed()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()


def live_folders() -> list[str]:
    """The folders of this process that are there now."""
    return [path for path, owner in _live.items() if owner == os.getpid()]


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        _live.pop(path, None)
        shutil.rmtree(path, ignore_errors=True)
