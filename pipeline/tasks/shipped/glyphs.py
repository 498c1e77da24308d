"""Digits and letters in many fonts, distorted: 62 classes, drawn here, nothing downloaded."""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...errors import DataError
from ...sources import content_digest
from ...task import SPLITS, SplitName
from ..image_classification import ImageClassification
from .augmentation import random_affine
from .fonts import Font, deal, draw, find_fonts
from .raw_images import RawImages, moments

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The classes, in the order of the labels."""

_ROWS: Mapping[SplitName, int] = {"train": 100, "calibration": 10, "validation": 20, "test": 40}
_FONT_SHARES = {"train": 3, "validation": 1, "test": 1}
_CHUNK = 1024
_BLUR_RADIUS = 3


def glyphs(
    seed: int = 0,
    size: int = 32,
    rows: Mapping[SplitName, int] | None = None,
    characters: str = CHARACTERS,
    system_fonts: bool = True,
    max_fonts: int = 100,
    augment: bool = True,
) -> ImageClassification:
    """Characters [1, size, size] in random fonts, turned, sheared, moved, zoomed, blurred, of low contrast and noisy.

    No font is in two of train, validation and test (calibration shares those of validation). Fonts come from
    matplotlib's wheel and, where installed, from the usual folders; which ones were used stands in `provenance` and so
    in the digest of the data.

    Args:
        seed: of fonts, distortions and noise.
        size: side of the images in pixels.
        rows: images per class in every split, default train 100, calibration 10, validation 20, test 40.
        characters: the classes.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.
        max_fonts: most fonts to use.
        augment: small turns, moves and zooms of the training batches on top.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    counts = dict(_ROWS if rows is None else rows)
    _check(size, counts, characters)
    fonts, refused = find_fonts(characters, system_fonts, seed, max_fonts)
    parts = deal(fonts, _FONT_SHARES, seed, refused)
    parts["calibration"] = parts["validation"]
    images = {
        name: _images(parts[name], characters, size, counts[name], seed, name) for name in SPLITS if name in counts
    }
    mean, std = moments(images["train"])
    preprocessing = Preprocessing("image", (size, size), 1, 1.0 / 255.0, mean, std)
    targets = {name: np.repeat(np.arange(len(characters)), counts[name]) for name in images}
    return ImageClassification(
        {name: RawImages(images[name], targets[name], preprocessing) for name in images},
        list(characters),
        preprocessing=preprocessing,
        augment=random_affine(rotation=6.0, shift=0.05, scale=0.05) if augment else None,
        name="glyphs",
        provenance={"fonts": {name: {font.name: font.sha256 for font in parts[name]} for name in images}},
        file_digests={font.path: content_digest(font.path) for name in images for font in parts[name]},
    )


def _check(size: int, rows: Mapping[SplitName, int], characters: str) -> None:
    if not isinstance(size, int) or size < 8:
        raise DataError(f"size is {size!r}; it is the side of the images in pixels, at least 8")
    if len(set(characters)) != len(characters) or len(characters) < 2:
        raise DataError(f"characters are {characters!r}: give two or more different ones")
    if "train" not in rows:
        raise DataError(f"rows {dict(rows)} lack 'train', whose mean and deviation normalise the images")
    for name, count in rows.items():
        if name not in SPLITS or not isinstance(count, int) or count < 1:
            raise DataError(f"rows {name!r}: {count!r}: give at least 1 image per class for {', '.join(SPLITS)}")


def _images(fonts: Sequence[Font], characters: str, size: int, count: int, seed: int, split: str) -> NDArray[np.uint8]:
    """`count` images of every character, class after class: uint8 [N, size, size, 1]; drawn in chunks."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(f"glyphs {seed} {split}".encode(), digest_size=7).digest(), "big")
    )
    clean = torch.from_numpy(np.stack([draw(font.path, characters, 2 * size) for font in fonts]))
    total = len(characters) * count
    character = torch.arange(total) // count
    # every class gets every font equally often, in an order of its own
    order = torch.cat([torch.randperm(count, generator=generator) for _ in characters])
    font = (order + character) % len(fonts)
    images = np.empty((total, size, size, 1), np.uint8)
    for start in range(0, total, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part, :, :, 0] = _distorted(clean[font[part], character[part]], size, generator).numpy()
    return images


def _distorted(clean: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random variations, uint8 [N, size, size], of uint8 [N, side, side].

    Computed in float64, so that rounding to bytes hides the last bits in which processors differ.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(clean), generator=generator, dtype=torch.float64)

    angle, shear, zoom, stretch = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.8, 1.1), uniform(0.88, 1.12)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across, down = zoom * stretch, zoom / stretch
    # from the place in the picture to the place in the clean glyph
    first = torch.stack([cos * across, (shear * cos - sin) * down, uniform(-0.15, 0.15)], 1)
    second = torch.stack([sin * across, (shear * sin + cos) * down, uniform(-0.12, 0.12)], 1)
    grid = nn.functional.affine_grid(torch.stack([first, second], 1), [len(clean), 1, size, size], align_corners=False)
    picture = nn.functional.grid_sample(clean[:, None].to(torch.float64) / 255, grid, align_corners=False)
    picture = _blurred(picture[:, 0], uniform(0.2, 1.0) * size / 32)
    background, contrast, noise = uniform(0.0, 0.4), uniform(0.25, 0.6), uniform(0.0, 0.1)
    picture = background[:, None, None] + contrast[:, None, None] * picture
    picture += noise[:, None, None] * torch.randn(picture.shape, generator=generator, dtype=torch.float64)
    return (255 * picture.clamp(0, 1)).round().to(torch.uint8)


def _blurred(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of [N, H, W], each with its own `sigma` [N] in pixels."""
    radius = max(_BLUR_RADIUS, math.ceil(2.5 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, dtype=pictures.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights /= weights.sum(dim=1, keepdim=True)
    for dim in (1, 2):
        pad = (0, 0, radius, radius) if dim == 1 else (radius, radius, 0, 0)
        padded = nn.functional.pad(pictures, pad)
        length = pictures.shape[dim]
        pictures = sum(
            (weights[:, k, None, None] * padded.narrow(dim, k, length) for k in range(2 * radius + 1)),
            start=torch.zeros_like(pictures),
        )
    return pictures
