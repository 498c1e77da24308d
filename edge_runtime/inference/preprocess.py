"""From a raw image to the network's input, with numpy alone.

``raw -> resize -> times scale -> minus mean -> over std -> channels first``. Resizing is bilinear with pixel centres
at half integers; when an image shrinks the triangle widens by the same factor, so every source pixel counts
(antialias). This is Pillow's ``BILINEAR`` and torch's ``interpolate(mode="bilinear", antialias=True)``,
computed in float32 and not rounded to whole grey levels in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Preprocessing
from ..errors import InputError

STEPS = ("decoded", "resized", "scaled", "mean", "std", "layout")
"""What `preprocessing_steps` names its arrays, in order."""

_WHITES = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
"""The value that stands for white in a dtype whose range is smaller than `Preprocessing.max_value`."""


def preprocess_image(image: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Applies the manifest's preprocessing.

    Args:
        image: [H, W, C] or [N, H, W, C]; with one channel also [H, W]. uint8; with a `max_value` also uint16, where it
            is beyond 65535 int32 and uint32 too, and float32 from files whose pixels are floats. In a dtype that does
            not reach `max_value` the largest value of the dtype is white.
        preprocessing: of kind ``"image"``.

    Returns:
        float32 [N, C, height, width]; N is 1 for a single image.

    Raises:
        InputError: another dtype, rank or number of channels, an empty image, or pixels outside 0 ... `max_value`.
    """
    result: NDArray[np.float32] | None = None
    for _, pixels in preprocessing_steps(image, preprocessing):
        result = pixels  # not a list of all steps: images are large
    assert result is not None
    return result


def preprocessing_steps(image: NDArray[Any], preprocessing: Preprocessing) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """`preprocess_image` step by step, see `STEPS`.

    Yields:
        the step and its result, float32 [N, H, W, C], the last one [N, C, H, W]. A result may be overwritten when the
        next one is asked for.

    Raises:
        InputError: as `preprocess_image`.
    """
    pixels = _raw_batch(image, preprocessing)
    yield "decoded", pixels
    if preprocessing.size is not None:
        pixels = resize_bilinear(pixels, preprocessing.size)
    yield "resized", pixels
    pixels *= np.float32(preprocessing.scale)
    yield "scaled", pixels
    if preprocessing.mean:
        pixels -= np.asarray(preprocessing.mean, np.float32)
    yield "mean", pixels
    if preprocessing.std:
        pixels /= np.asarray(preprocessing.std, np.float32)
    yield "std", pixels
    yield "layout", np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def outside_range(pixels: NDArray[Any], max_value: float) -> str | None:
    """What in `pixels` lies outside 0 ... `max_value`; None if nothing does."""
    if pixels.size == 0 or max_value > _WHITES.get(pixels.dtype, math.inf):
        return None
    low, high = pixels.min(), pixels.max()
    if low >= 0 and high <= max_value:
        return None
    wrong = low if not low >= 0 else high  # NaN is neither
    return f"the pixel value {wrong:g}, outside of 0 to {max_value:g}"


def _raw_batch(image: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """float32 [N, H, W, C] in units of the largest value: 255, or `max_value`."""
    dtype, largest, channels = image.dtype.newbyteorder("="), preprocessing.max_value, preprocessing.channels
    known = _dtypes(largest)
    wanted = " or ".join(known)
    if dtype.name not in known:
        hint = ""
        if largest is None and dtype.kind in "iu":
            hint = ": more than 8 bits need a model that was trained with `max_value`, the value that stands for white"
        raise InputError(
            f"an image for this model is {wanted} [H, W, {channels}], got {dtype} {list(image.shape)}{hint}"
        )
    batch = image
    if batch.ndim == 2 and channels == 1:
        batch = batch[:, :, None]
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim != 4 or batch.shape[-1] != channels or 0 in batch.shape:
        shapes = f"[H, W, {channels}] or [N, H, W, {channels}]"
        raise InputError(f"an image for this model is {wanted} {shapes}, got {list(image.shape)}")
    pixels = batch.astype(np.float32)
    if largest is not None:
        if reason := outside_range(batch.astype(dtype, copy=False), largest):
            raise InputError(f"an image has {reason}, the range of this model")
        if largest > _WHITES.get(dtype, math.inf):
            pixels *= np.float32(largest / _WHITES[dtype])
    return pixels


def _dtypes(max_value: float | None) -> tuple[str, ...]:
    if max_value is None:
        return ("uint8",)
    wide = ("int32", "uint32") if max_value > 65535 else ()
    return ("uint8", "uint16", *wide, "float32")


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
