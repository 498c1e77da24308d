"""Whether a file is still the one whose hash was checked, without reading it again where the system can tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_COARSEST_NS = 2_100_000_000
"""Two changes within this time may have one time stamp: FAT's, and a little."""


@dataclass(frozen=True)
class Seal:
    """What a system changes along with a file's content, taken before the content was read.

    Attributes:
        state: device, inode, size, and the times of the last change of content and of anything.
        young: whether the file had been changed so shortly before that a further change may not show in `state`.
    """

    state: tuple[int, int, int, int, int]
    young: bool


def seal_of(path: Path) -> Seal:
    """The seal of a file as it is now."""
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return Seal(state, max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - _COARSEST_NS)
