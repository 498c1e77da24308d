"""TrueType fonts that can draw given characters: found on this machine, tried, and drawn with Pillow."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ...sources import sha256_of

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_SUFFIXES = frozenset({".ttf", ".otf"})
_CAP_HEIGHT, _BASELINE = 0.45, 0.68
_LOOKS = 0.6
_PROBE = 48


@dataclass(frozen=True)
class Font:
    """A font file.

    Attributes:
        family, style: as the font calls itself.
        path: the file.
        sha256: of its content.
    """

    family: str
    style: str
    path: Path
    sha256: str

    @property
    def name(self) -> str:
        """Family and style."""
        return f"{self.family} {self.style}"


class UnusableFontError(DataError):
    """Why a font cannot draw the characters."""


def find_fonts(characters: str, system: bool, seed: int, most: int) -> tuple[list[Font], dict[str, str]]:
    """The fonts of matplotlib's wheel, and those installed, that have a letter-like glyph for each character.

    Equal files count once, and so do files of equal family and style: another version of a font is no other font.

    Args:
        characters: what has to be drawn.
        system: also look into the usual folders of this machine.
        seed: decides which fonts are taken where there are more than `most`.
        most: fonts to stop at; those of matplotlib come first.

    Returns:
        the fonts, in an order that does not depend on where they lie, and per refused file name the reason.

    Raises:
        DataError: Pillow or matplotlib is not installed.
    """
    found: dict[tuple[str, str], Font] = {}
    refused: dict[str, str] = {}
    seen: set[str] = set()
    for folders in [[_matplotlib_folder()], _system_folders() if system else []]:
        # by name, because reading every file of a machine with thousands of fonts would take long
        for path in sorted(_files(folders), key=lambda path: (_rank(path.name, seed), str(path))):
            if len(found) >= most:
                break
            digest = sha256_of(path)
            if digest in seen:
                continue
            seen.add(digest)
            try:
                family, style = check_font(path, characters)
            except UnusableFontError as reason:
                refused[path.name] = str(reason)
                continue
            found.setdefault((family, style), Font(family, style, path, digest))
    return sorted(found.values(), key=lambda font: (font.family, font.style)), refused


def check_font(path: Path, characters: str) -> tuple[str, str]:
    """Family and style of a font that has a glyph of the usual shape for each of `characters`.

    Raises:
        UnusableFontError: it cannot be read; a glyph is missing, blank or drawn like another; or, as in symbol fonts,
            most glyphs look like something else.
    """
    pictures = draw(path, characters + "\uffff", _PROBE)
    # U+FFFF is no character: fonts draw their sign for a missing glyph
    glyphs, missing = pictures[:-1], pictures[-1]
    owner: dict[bytes, str] = {}
    for character, glyph in zip(characters, glyphs, strict=True):
        if not glyph.any():
            raise UnusableFontError(f"its glyph for {character!r} is blank")
        if np.array_equal(glyph, missing):
            raise UnusableFontError(f"it has no glyph for {character!r}")
        other = owner.setdefault(glyph.tobytes(), character)
        if other != character:
            raise UnusableFontError(f"it draws {character!r} like {other!r}")
    share = _recognised(glyphs, characters)
    if share < _LOOKS:
        raise UnusableFontError(f"only {share:.0%} of its glyphs look like their characters: a symbol font")
    family, style = _load(path, _PROBE).getname()
    return str(family or path.stem), str(style or "Regular")


def draw(path: Path, characters: str, side: int) -> NDArray[np.uint8]:
    """White characters on black, uint8 [len(characters), side, side].

    All fonts are drawn with capitals of one height on one baseline, so that size and place tell o from O.

    Raises:
        UnusableFontError: the font cannot be read, or has no capital H.
    """
    from PIL import Image, ImageDraw

    box = _load(path, 100).getbbox("H", anchor="ls")
    if box[1] >= 0:
        raise UnusableFontError("its glyph for 'H' is blank")
    font = _load(path, max(1, round(100 * _CAP_HEIGHT * side / -box[1])))
    pictures = np.zeros((len(characters), side, side), np.uint8)
    for index, character in enumerate(characters):
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text((side / 2, round(_BASELINE * side)), character, 255, font, anchor="ms")
        pictures[index] = np.asarray(image)
    return pictures


def deal(
    fonts: Sequence[Font], shares: Mapping[str, int], seed: int, refused: Mapping[str, str] | None = None
) -> dict[str, list[Font]]:
    """Deals fonts out: no font is in two parts, and every family is spread over the parts as evenly as it goes.

    Args:
        fonts: at least as many as there are parts.
        shares: part -> how many of every ``sum(shares)`` fonts it gets.
        seed: another seed, another deal.
        refused: reasons per file, for the error.

    Raises:
        DataError: too few fonts.
    """
    if len(fonts) < sum(shares.values()):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list((refused or {}).items())[:8])
        raise DataError(
            f"{len(fonts)} usable fonts are too few for disjoint splits, {sum(shares.values())} are needed: raise "
            f"max_fonts, install font packages, or choose characters that more fonts have{reasons}"
        )
    # round robin by share: the part that is furthest behind is next
    pattern: list[str] = []
    for length in range(1, sum(shares.values()) + 1):
        behind = {part: share * length - pattern.count(part) * sum(shares.values()) for part, share in shares.items()}
        pattern.append(max(behind, key=lambda part: behind[part]))
    families = sorted({font.family for font in fonts}, key=lambda family: _rank(family, seed))
    ordered = [
        font
        for family in families
        for font in sorted((f for f in fonts if f.family == family), key=lambda f: _rank(f.sha256, seed))
    ]
    parts: dict[str, list[Font]] = {part: [] for part in shares}
    for place, font in enumerate(ordered):
        parts[pattern[place % len(pattern)]].append(font)
    return parts


def _rank(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), key=str(seed).encode()).digest()


def _load(path: Path, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    try:
        # the basic layout is in every build of Pillow
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ValueError) as error:
        raise UnusableFontError(f"it cannot be read ({error})") from error


def _matplotlib_folder() -> Path:
    try:
        import matplotlib
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError("drawing glyphs needs Pillow and matplotlib: pip install pillow matplotlib") from error
    return Path(matplotlib.get_data_path(), "fonts", "ttf")


def _system_folders() -> list[Path]:
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [*(Path(folder, "fonts") for folder in shared.split(":") if folder), home / "fonts", Path.home() / ".fonts"]


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in names if Path(name).suffix.lower() in _SUFFIXES)


def _recognised(glyphs: NDArray[np.uint8], characters: str) -> float:
    """Share of the glyphs whose nearest glyph in the reference fonts is the same character, in either case."""
    shapes = _shapes(glyphs)
    nearness = np.max([shapes @ reference.T for reference in _references(characters)], axis=0)
    same = [characters[best].lower() == c.lower() for best, c in zip(nearness.argmax(axis=1), characters, strict=True)]
    return float(np.mean(same))


@functools.lru_cache(maxsize=4)
def _references(characters: str) -> list[NDArray[np.float64]]:
    names = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSans-Oblique.ttf", "STIXGeneralItalic.ttf")
    files = [_matplotlib_folder() / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"matplotlib lacks its font {missing[0]}: reinstall matplotlib")
    return [_shapes(draw(file, characters, _PROBE)) for file in files]


def _shapes(glyphs: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Glyphs cut out, scaled to 16 x 16 and normalised: [N, 256] of length 1."""
    from PIL import Image

    rows = []
    for glyph in glyphs:
        image = Image.fromarray(glyph)
        scaled = image.crop(image.getbbox()).resize((16, 16), Image.Resampling.BILINEAR)
        row = np.asarray(scaled, np.float64).ravel()
        row -= row.mean()
        rows.append(row / max(float(np.linalg.norm(row)), 1e-9))
    return np.stack(rows)
