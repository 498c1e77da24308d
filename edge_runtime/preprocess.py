"""From a raw image to the network's input, with numpy alone.

``resize -> times scale -> minus mean -> over std -> channels first``. Resizing is bilinear with pixel centres
at half integers; when an image shrinks the triangle widens by the same factor, so every source pixel counts
(antialias). This is Pillow's ``BILINEAR`` and torch's ``interpolate(mode="bilinear", antialias=True)``,
computed in float32 and not rounded to whole grey levels in between.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .manifest import Preprocessing


def preprocess_image(image: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Applies the manifest's preprocessing.

    Args:
        image: uint8 [H, W, C] or [N, H, W, C]; with one channel also [H, W].
        preprocessing: of kind ``"image"``.

    Returns:
        float32 [N, C, height, width]; N is 1 for a single image.

    Raises:
        InputError: another dtype, rank or number of channels, or an empty image.
    """
    if image.dtype != np.uint8:
        raise InputError(f"an image is uint8 [H, W, C], got {image.dtype} {list(image.shape)}")
    channels = preprocessing.channels
    batch = image
    if batch.ndim == 2 and channels == 1:
        batch = batch[:, :, None]
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim != 4 or batch.shape[-1] != channels or 0 in batch.shape:
        wanted = f"[H, W, {channels}] or [N, H, W, {channels}]"
        raise InputError(f"an image for this model is uint8 {wanted}, got {list(image.shape)}")
    pixels = batch.astype(np.float32)
    if preprocessing.size is not None:
        pixels = resize_bilinear(pixels, preprocessing.size)
    pixels *= np.float32(preprocessing.scale)
    if preprocessing.mean:
        pixels -= np.asarray(preprocessing.mean, np.float32)
    if preprocessing.std:
        pixels /= np.asarray(preprocessing.std, np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def resize_bilinear(images: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resizes float32 [N, H, W, C] to [N, height, width, C]; see the head of this module."""
    height, width = size
    return _resize_axis(_resize_axis(images, 2, width), 1, height)


def _resize_axis(images: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    if images.shape[axis] == size:
        return images.copy()
    indices, weights = _taps(images.shape[axis], size)
    shape = [1] * images.ndim
    shape[axis] = size
    result: NDArray[np.float32] | None = None
    for tap in range(indices.shape[1]):
        part = np.take(images, indices[:, tap], axis=axis)
        part *= weights[:, tap].reshape(shape)
        result = part if result is None else np.add(result, part, out=result)
    assert result is not None
    return result


@functools.lru_cache(maxsize=32)
def _taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Source pixels and weights of every target pixel, both [new, taps]; the weights of a row sum to 1."""
    factor = old / new
    radius = max(factor, 1.0)
    centres = (np.arange(new) + 0.5) * factor - 0.5
    first = np.ceil(centres - radius).astype(np.int64)
    indices = first[:, None] + np.arange(math.floor(2 * radius) + 1)
    weights = np.maximum(1 - np.abs(indices - centres[:, None]) / radius, 0)
    weights[(indices < 0) | (indices >= old)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, old - 1), weights.astype(np.float32)
