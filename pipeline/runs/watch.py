"""Files that the keys of a run speak of: an edit while the run is at work must not end up under the old key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import EditedSourceError
from ..sources import content_digest, own_sources, portable_name, sha256_of
from ..task import FromFiles, Task

_SETTLED_NS = 2_000_000_000
"""A file that was written less long ago may be written again without another time stamp."""
_SOURCE = ".py"


@dataclass(frozen=True)
class _Stamp:
    """What the file system says of a file; equal stamps of settled files stand for equal content."""

    size: int
    inode: int
    modified: int
    changed: int


@dataclass(frozen=True)
class _Known:
    """A file as it was: its digest, how that is computed, and its stamp if that may be trusted."""

    digest: str
    compute: Callable[[Path], str]
    stamp: _Stamp | None


class Watch:
    """The user's sources, weights and data files of a run, and our own sources, with the content that its keys hold.

    Args:
        imported: sha256 of the user's modules that are in memory, by file; see `imports_held`. May grow.
    """

    def __init__(self, imported: Mapping[Path, str]) -> None:
        self._imported = imported
        self._began = time.time_ns()
        self._known: dict[Path, _Known] = {}

    def digests(self, paths: Iterable[Path], root: Path) -> dict[str, str]:
        """As `sources.file_digests`; the files are watched from now on.

        Raises:
            EditedSourceError: one was edited since it was imported, or since it was first watched.
        """
        found: dict[str, str] = {}
        for path in paths:
            found[portable_name(path, root)] = self._add(path, sha256_of)
        return dict(sorted(found.items()))

    def digest(self, path: Path) -> str:
        """sha256 of one file, which is watched from now on."""
        return self._add(path, sha256_of)

    def data(self, task: Task) -> None:
        """Watches the files that a task names, see `FromFiles`."""
        for holder in (task, *task.splits.values()):
            if isinstance(holder, FromFiles):
                for path, digest in holder.file_digests.items():
                    self._add(path, content_digest, digest)

    def check(self) -> None:
        """Compares all files with what the keys hold. Reads sources, and of other files those with a new time stamp.

        Raises:
            EditedSourceError: names the file.
        """
        for path, digest in self._imported.items():
            # what is in use and no key speaks of: imported by a computed name
            self._known.setdefault(path, _Known(digest, sha256_of, None))
        for path, known in self._known.items():
            if self._imported.get(path, known.digest) != known.digest:
                raise _edited(path)
            now, stamp = time.time_ns(), _stamp(path)
            if stamp is not None and stamp == known.stamp:
                continue
            if self._now(path, known.compute) != known.digest:
                raise _edited(path)
            self._known[path] = _Known(known.digest, known.compute, _trusted(path, stamp, now))
        for path, digest in own_sources().items():
            if self._now(path, sha256_of) != digest:
                raise EditedSourceError(
                    f"{path}, a file of edgewright, was edited since this process started; nothing was stored since "
                    "then: run again in a new process"
                )

    def _add(self, path: Path, compute: Callable[[Path], str], digest: str | None = None) -> str:
        path = path.resolve()
        known = self._known.get(path)
        if known is not None and known.compute is compute:
            now = self._now(path, compute)
            if now != known.digest or digest not in (None, now):
                raise _edited(path)
            return known.digest
        stamp = _stamp(path)
        digest = self._now(path, compute) if digest is None else digest
        # the code in memory is what results are made by; the text on the disk is what the key holds
        if self._imported.get(path, digest) != digest:
            raise _edited(path)
        # since the beginning, not since now: whoever gives a digest read the file some time ago
        self._known[path] = _Known(digest, compute, _trusted(path, stamp, self._began))
        return digest

    @staticmethod
    def _now(path: Path, compute: Callable[[Path], str]) -> str:
        try:
            return compute(path)
        except OSError:
            return ""


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Stamp(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _trusted(path: Path, stamp: _Stamp | None, since_ns: int) -> _Stamp | None:
    """`stamp` if an edit after `since_ns` would have changed it; sources are small enough to be read each time."""
    if stamp is None or path.suffix == _SOURCE or stamp.changed > since_ns - _SETTLED_NS:
        return None
    return stamp


def _edited(path: Path) -> EditedSourceError:
    what = "was edited" if path.exists() else "has gone"
    return EditedSourceError(
        f"{path} {what} while the run was at work; nothing was stored since then, what was finished before stays: take "
        "the edit back and run again to go on, or run again to begin with the file as it is now"
    )
