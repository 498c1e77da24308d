"""Glyphs scattered over pages: one drawing that serves segmentation, several labels and boxes alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...errors import DataError
from ...sources import content_digest
from ...task import SPLITS, SplitName
from .fonts import Font, deal, draw, find_fonts
from .raw_images import moments

CHARACTERS = "ABEGKRSX"
"""The classes, in the order of their numbers."""

NO_BOX = -1
"""Class of what fills up the boxes of a page."""

_ROWS: Mapping[SplitName, int] = {"train": 600, "calibration": 100, "validation": 200, "test": 400}
_FONT_SHARES = {"train": 3, "validation": 1, "test": 1}
_CHUNK = 64
_GLYPH_SIDE = 48
_SMALLEST, _LARGEST = 0.3, 0.55  # side of a glyph's square, in sides of the page
_STROKES = 4
_VISIBLE = 0.5  # share of a glyph's pixels that must stay uncovered
_INK = 0.5
_FEWEST_PIXELS = 6


@dataclass(frozen=True)
class Pages:
    """Pages of one split.

    Attributes:
        images: uint8 [N, H, W, 1].
        masks: int64 [N, H, W]; 0 is the page, ``c + 1`` a pixel of class c.
        boxes: float32 [N, M, 5]: class, left, top, right, bottom in pixels; class `NO_BOX` fills up.
        present: bool [N, C], the classes that a page shows.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.int64]
    boxes: NDArray[np.float32]
    present: NDArray[np.bool_]


@dataclass(frozen=True)
class Book:
    """All splits, and what a task says of them.

    Attributes:
        pages: per split.
        preprocessing: with mean and deviation of the train split.
        provenance: the fonts of every split.
        file_digests: of their files.
    """

    pages: Mapping[SplitName, Pages]
    preprocessing: Preprocessing
    provenance: Mapping[str, Any]
    file_digests: Mapping[Path, str]


def draw_book(
    seed: int = 0,
    rows: Mapping[SplitName, int] | None = None,
    size: int = 64,
    characters: str = CHARACTERS,
    most: int = 5,
    system_fonts: bool = False,
) -> Book:
    """Pages with one to `most` characters of random fonts, sizes, turns and shades among strokes, half covered at most.

    No font is in two of train, validation and test (calibration shares those of validation).

    Args:
        seed: of fonts, places, distortions and noise.
        rows: pages in every split, default train 600, calibration 100, validation 200, test 400.
        size: side of the pages in pixels.
        characters: the classes.
        most: characters on a page.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    counts = dict(_ROWS if rows is None else rows)
    _check(size, counts, characters, most)
    fonts, refused = find_fonts(characters, system_fonts, seed, 100)
    parts = deal(fonts, _FONT_SHARES, seed, refused)
    parts["calibration"] = parts["validation"]
    pages = {
        name: _pages(parts[name], characters, size, counts[name], most, seed, name) for name in SPLITS if name in counts
    }
    mean, deviation = moments(pages["train"].images)
    return Book(
        pages,
        Preprocessing("image", (size, size), 1, 1.0 / 255.0, mean, deviation),
        {"fonts": {name: {font.name: font.sha256 for font in parts[name]} for name in pages}},
        {font.path: content_digest(font.path) for name in pages for font in parts[name]},
    )


def _check(size: int, rows: Mapping[SplitName, int], characters: str, most: int) -> None:
    if not isinstance(size, int) or size < 16:
        raise DataError(f"size is {size!r}; it is the side of the pages in pixels, at least 16")
    if len(set(characters)) != len(characters) or len(characters) < 2:
        raise DataError(f"characters are {characters!r}: give two or more different ones")
    if not isinstance(most, int) or not 1 <= most <= 32:
        raise DataError(f"most is {most!r}; it is how many characters a page has, 1 to 32")
    if "train" not in rows:
        raise DataError(f"rows {dict(rows)} lack 'train', whose mean and deviation normalise the pages")
    for name, count in rows.items():
        if name not in SPLITS or not isinstance(count, int) or count < 1:
            raise DataError(f"rows {name!r}: {count!r}: give at least 1 page for each of {', '.join(SPLITS)}")


def _pages(fonts: Sequence[Font], characters: str, size: int, count: int, most: int, seed: int, split: str) -> Pages:
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(f"pages {seed} {split}".encode(), digest_size=7).digest(), "big")
    )
    clean = torch.from_numpy(np.stack([draw(font.path, characters, _GLYPH_SIDE) for font in fonts]))
    drawn = [_drawn(clean, size, min(_CHUNK, count - start), most, generator) for start in range(0, count, _CHUNK)]
    images, masks, boxes = (np.concatenate(part) for part in zip(*drawn, strict=True))
    present = (boxes[:, :, :1] == np.arange(len(characters))).any(axis=1)
    return Pages(images, masks, boxes, present)


def _drawn(
    clean: Tensor, size: int, count: int, most: int, generator: torch.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]:
    """Images, masks and boxes of `count` pages; see `Pages`.

    Computed in float64, so that rounding to bytes hides the last bits in which processors differ.

    Args:
        clean: uint8 [fonts, characters, side, side].
        size: side of a page.
        count: pages.
        most: glyphs on a page.
        generator: of everything.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    fonts, classes = clean.shape[:2]
    font = torch.randint(fonts, (count, most), generator=generator)
    label = torch.randint(classes, (count, most), generator=generator)
    on_page = torch.arange(most) < torch.randint(1, most + 1, (count, 1), generator=generator)
    side = uniform(_SMALLEST, _LARGEST, count, most)
    ink = _placed(clean[font, label].to(torch.float64) / 255, side, size, uniform) * on_page[:, :, None, None]
    solid = ink > _INK
    covered = torch.zeros(count, size, size, dtype=torch.bool)
    kept = torch.zeros(count, most, dtype=torch.bool)
    visible = torch.zeros_like(solid)
    for glyph in range(most):  # the first lies on top
        here = solid[:, glyph] & ~covered
        pixels = here.sum(dim=(1, 2))
        kept[:, glyph] = (pixels >= _VISIBLE * solid[:, glyph].sum(dim=(1, 2))) & (pixels >= _FEWEST_PIXELS)
        visible[:, glyph] = here & kept[:, glyph, None, None]
        covered |= visible[:, glyph]
    ink = ink * kept[:, :, None, None]
    page = uniform(0.0, 0.35, count)[:, None, None].expand(count, size, size).clone()
    page = page + _strokes(size, count, uniform) * uniform(0.1, 0.35, count)[:, None, None]
    shade = uniform(0.3, 0.6, count, most)
    for glyph in reversed(range(most)):
        under = ink[:, glyph]
        page = page * (1 - under) + under * (page.mean(dim=(1, 2))[:, None, None] + shade[:, glyph, None, None])
    noise = uniform(0.02, 0.12, count)[:, None, None]
    page = page + noise * torch.randn(page.shape, generator=generator, dtype=torch.float64)
    masks = (visible * (label + 1)[:, :, None, None]).amax(dim=1)
    boxes = _boxes(solid & kept[:, :, None, None], label, kept)
    images = (255 * page.clamp(0, 1)).round().to(torch.uint8)
    return images[..., None].numpy(), masks.numpy(), boxes.numpy()


def _placed(glyphs: Tensor, side: Tensor, size: int, uniform: Any) -> Tensor:
    """Glyphs [N, M, s, s] turned, stretched and put somewhere on pages [N, M, size, size]."""
    count, most = side.shape
    angle, stretch = uniform(-0.35, 0.35, count, most), uniform(0.85, 1.18, count, most)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # from a place on the page to the place in the glyph's square; the square's middle stays inside the page
    across, down = 1 / (side * stretch), stretch / side
    middle = (uniform(-1, 1, 2, count, most) * (1 - 0.8 * side)).unbind(0)
    first = torch.stack([cos * across, -sin * down, -(cos * middle[0] * across - sin * middle[1] * down)], -1)
    second = torch.stack([sin * across, cos * down, -(sin * middle[0] * across + cos * middle[1] * down)], -1)
    theta = torch.stack([first, second], -2).flatten(0, 1)
    grid = nn.functional.affine_grid(theta, [count * most, 1, size, size], align_corners=False)
    flat = nn.functional.grid_sample(glyphs.flatten(0, 1)[:, None], grid, align_corners=False)
    return flat.reshape(count, most, size, size)


def _strokes(size: int, count: int, uniform: Any) -> Tensor:
    """Straight strokes that belong to no character, [N, size, size] in 0 ... 1."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    down, across = places[None, None, :, None], places[None, None, None, :]
    start, end = uniform(0, 1, 2, count, _STROKES, 1, 1), uniform(0, 1, 2, count, _STROKES, 1, 1)
    run, rise = end - start
    length = (run**2 + rise**2).clamp(min=1e-6)
    along = (((across - start[0]) * run + (down - start[1]) * rise) / length).clamp(0, 1)
    distance = (across - start[0] - along * run) ** 2 + (down - start[1] - along * rise) ** 2
    width = uniform(0.008, 0.02, count, _STROKES, 1, 1)
    return torch.exp(-distance / (2 * width**2)).amax(dim=1)


def _boxes(solid: Tensor, label: Tensor, kept: Tensor) -> Tensor:
    """float32 [N, M, 5] around the ink bool [N, M, H, W] of what was kept."""
    size = solid.shape[-1]
    columns, rows = solid.any(dim=2), solid.any(dim=3)
    ends = [axis.to(torch.uint8).argmax(dim=2) for axis in (columns, rows)]
    far = [size - axis.flip(2).to(torch.uint8).argmax(dim=2) for axis in (columns, rows)]
    found = torch.stack([label, *ends, *far], dim=2).to(torch.float32)
    nothing = torch.tensor([float(NO_BOX), 0.0, 0.0, 0.0, 0.0])
    return torch.where(kept[:, :, None], found, nothing)
