"""The names of a bundle's files: what lies in its folder, and which names mean the same file on every system."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import BundleError

_DEVICES = {
    *("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"),
    *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"),  # Windows takes superscripts for digits here
}
_MOST_CHARACTERS, _MOST_FOLDERS = 240, 32
"""Of a name in a bundle: what every system can hold below some folder."""
_MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class Listing:
    """What lies in a folder.

    Attributes:
        names: of all files, with forward slashes.
        linked: whether some of them are reached over links.
    """

    names: frozenset[str]
    linked: bool = False


def listing(folder: Path, follow_links: bool = False) -> Listing:
    """All files below `folder`.

    Args:
        folder: the folder; it may be a link itself.
        follow_links: whether links, to files or folders, count as what they lead to.

    Raises:
        BundleError: a link, unless they are followed; what is neither file nor folder; more or deeper folders than a
            bundle has; two names that are one on some systems.
        OSError: a folder that cannot be listed.
    """
    names: set[str] = set()
    linked = False
    pending, entries = [""], 0
    while pending:  # `os.walk` calls itself for every level, and leaves out what cannot be listed
        inside = pending.pop()
        with os.scandir(folder / inside) as found:
            for entry in found:
                entries += 1
                name = inside + entry.name
                if entries > _MOST_ENTRIES:
                    raise BundleError(f"{folder} holds more than {_MOST_ENTRIES} files and folders: this is no bundle")
                if entry.is_symlink():
                    _require_followed(name, folder, follow_links)
                    linked = True
                if entry.is_dir():
                    check_depth(name, folder)
                    pending.append(name + "/")
                elif entry.is_file():
                    names.add(name)
                else:
                    what = "leads to no file" if entry.is_symlink() else "is no plain file"
                    raise BundleError(f"{folder} holds {name!r}, which {what}")
    require_distinct(sorted(names), folder)
    return Listing(frozenset(names), linked)


def _require_followed(name: str, folder: Path, follow_links: bool) -> None:
    if not follow_links:
        raise BundleError(
            f"{folder} holds the symlink {name!r}, and a bundle holds plain files. Stores of files make such folders: "
            "--follow-links (follow_links=True of open_bundle in Python) takes what the links lead to, held to the "
            "same hashes; or pack the files into a zip"
        )


def require_distinct(names: Iterable[str], source: Path) -> None:
    """Refuses names, of files or folders, that are one where case or the form of an accent makes no difference."""
    seen: dict[str, str] = {}
    for name in names:
        for place in (name, *map(str, PurePosixPath(name).parents)):
            other = seen.setdefault(_canonical(place), place)
            if other != place:
                raise BundleError(f"{source} holds {other!r} and {place!r}, which are one file on some systems")


def _canonical(name: str) -> str:
    """Equal for names that differ in no more than case and the form of accents: canonical caseless matching."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def check_name(name: str, source: Path) -> None:
    """Refuses a name that could mean a place outside the bundle on any system, or that not every system takes."""
    check_depth(name, source)
    pure = PurePosixPath(name)
    unsafe = not name or pure.is_absolute() or ".." in pure.parts or str(pure) != name
    if unsafe or any(character in name for character in "\\:\0"):
        raise BundleError(f"{source} names {name!r}, which may leave the bundle's folder: do not use this bundle")
    for part in pure.parts:
        # Windows opens a device for the first, and another file or none for the others
        device = part.split(".")[0].rstrip().upper() in _DEVICES
        if device or part[-1] in ". " or any(c in '*?"<>|' or not c.isprintable() for c in part):
            raise BundleError(f"{source} names {name!r}, which is no file name on every system: do not use this bundle")


def check_depth(name: str, source: Path) -> None:
    """Refuses a name that is longer, or in more folders, than every system takes."""
    if len(name) > _MOST_CHARACTERS or name.count("/") >= _MOST_FOLDERS:
        raise BundleError(
            f"{source} names {name[:40]!r}..., {len(name)} characters in {name.count('/')} folders, which not every "
            "system takes: do not use this bundle"
        )
