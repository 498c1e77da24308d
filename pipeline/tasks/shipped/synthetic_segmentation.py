"""Images that are made up: a bright disc and a striped square on noise, to try recipes for segmentation on."""

from __future__ import annotations

import torch

from ...errors import DataError
from ...metric import IGNORED
from ..segmentation import Segmentation


def synthetic_segmentation(seed: int = 0, rows: int = 240, size: int = 16) -> Segmentation:
    """Images [1, size, size] with three classes of pixels; the outermost frame of pixels is not judged.

    Args:
        seed: of the images.
        rows: of all splits together.
        size: side in pixels.

    Raises:
        DataError: too few rows to be split, or images that are too small.
    """
    if not isinstance(rows, int) or rows < 20 or not isinstance(size, int) or size < 8:
        raise DataError(f"rows is {rows!r} and size {size!r}: give at least 20 rows of at least 8 pixels")
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(size, dtype=torch.float32)
    down, across = places[None, :, None], places[None, None, :]
    disc = torch.rand(rows, 2, 1, 1, generator=generator) * size
    square = torch.rand(rows, 2, 1, 1, generator=generator) * size
    targets = torch.zeros(rows, size, size, dtype=torch.int64)
    targets[((down - disc[:, 0]) ** 2 + (across - disc[:, 1]) ** 2) < (size / 4) ** 2] = 1
    inside = ((down - square[:, 0]).abs() < size / 6) & ((across - square[:, 1]).abs() < size / 6)
    targets[inside] = 2
    stripes = ((across % 2) * 2 - 1).expand(rows, size, size)
    images = torch.where(targets == 1, 1.0, 0.0) + torch.where(targets == 2, stripes, torch.zeros(()))
    images = images + 0.3 * torch.randn(rows, size, size, generator=generator)
    for edge in (0, size - 1):
        targets[:, edge], targets[:, :, edge] = IGNORED, IGNORED
    return Segmentation.from_arrays(
        images[:, None], targets, ("ground", "disc", "square"), seed=seed, name="synthetic_segmentation"
    )
