"""Pages with scattered characters, made worse: to try recipes for restoration on without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...task import SplitName
from ..restoration import Degradation, Restoration, check_ssim
from .pages import CHARACTERS, draw_book
from .raw_images import image_digests


def synthetic_restoration(
    seed: int = 0,
    rows: Mapping[SplitName, int] | None = None,
    size: int = 32,
    scale: int = 1,
    noise: float = 0.2,
    characters: str = CHARACTERS,
    most: int = 3,
    system_fonts: bool = False,
    metric: str = "psnr",
) -> Restoration:
    """Pages [1, size, size] without their noise, or from pages smaller by `scale`.

    Args:
        seed: of fonts, places, distortions and noise.
        rows: pages in every split, default train 600, calibration 100, validation 200, test 400.
        size: side of the pages that are to be given back, in pixels.
        scale: how many times smaller the model reads them.
        noise: standard deviation of the noise, of pixels in 0 ... 1.
        characters: that are on the pages.
        most: characters on a page.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.
        metric: ``psnr`` or ``ssim``.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    degradation = Degradation(scale, noise, seed)
    if metric == "ssim":
        check_ssim((size, size))
    book = draw_book(seed, rows, size, characters, most, system_fonts)
    splits: dict[SplitName, Any] = {}
    for name, pages in book.pages.items():
        good = torch.from_numpy(pages.images).permute(0, 3, 1, 2).float() / 255.0
        splits[name] = (degradation.applied(good, image_digests(pages.images)), good)
    return Restoration(
        splits,
        metric=metric,
        preprocessing=Preprocessing("image", (size // scale, size // scale), 1, 1.0 / 255.0),
        name="synthetic_restoration",
        provenance=book.provenance,
        file_digests=book.file_digests,
    )
