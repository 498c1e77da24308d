"""Random variations of a batch of images, vectorised, each from the generator that is handed in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..image_classification import Augmentation


def random_affine(rotation: float = 10.0, shift: float = 0.08, scale: float = 0.1) -> Augmentation:
    """Turns, moves and zooms every image by an own random amount; the border is repeated outwards.

    Args:
        rotation: largest angle, degrees.
        shift: largest move, as a share of the side.
        scale: largest zoom in or out, as a share.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        uniform = 2.0 * torch.rand(4, len(images), generator=generator) - 1.0
        angle, zoom = math.radians(rotation) * uniform[0], 1.0 + scale * uniform[1]
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        # the grid runs from -1 to 1, so a share of the side is twice as much
        moves = 2.0 * shift * uniform[2:]
        matrix = torch.stack([torch.stack([cos, -sin, moves[0]], 1), torch.stack([sin, cos, moves[1]], 1)], 1)
        grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)

    return augment


def flip_and_crop(flip: bool = True, padding: int = 0, fill: Sequence[float] = (0.0,)) -> Augmentation:
    """Mirrors half of the images left to right, moves each by up to `padding` pixels; `fill` comes in.

    Args:
        flip: whether to mirror.
        padding: pixels.
        fill: colour of the inputs, after normalisation, one number or one per channel; 0 is the mean colour.
    """
    border = torch.tensor(list(fill))[None, :, None, None]

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        mirrored = torch.rand(count, generator=generator) < 0.5
        offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
        if flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if not padding:
            return images
        padded = border.expand(count, channels, height + 2 * padding, width + 2 * padding).clone()
        padded[..., padding : padding + height, padding : padding + width] = images
        rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
        return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns]

    return augment
