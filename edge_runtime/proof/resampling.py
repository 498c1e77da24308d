"""Ways of making an image fit that others have, to tell which of them a given tensor went; ours is in `preprocess`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""[H, W, C]; NaN where a way says nothing of a pixel."""


@dataclass(frozen=True)
class Resampling:
    """How an image came to its size."""

    text: str
    """For people."""
    make: Callable[[Pixels, tuple[int, int]], Pixels]
    """[H, W, C] and (height, width) -> [height, width, C]."""


def resample(image: Pixels, size: tuple[int, int], kernel: str, antialias: bool, corners: bool = False) -> Pixels:
    """Resizes [H, W, C] to [height, width, C].

    Args:
        image: float32.
        size: (height, width).
        kernel: ``"floor"`` or ``"nearest"`` (one pixel each), ``"area"``, ``"bilinear"``, ``"bicubic"``, ``"lanczos"``.
        antialias: widen the kernel where the image shrinks.
        corners: the outer pixels' centres stay where they are (``align_corners``).
    """
    for axis, new in enumerate(size):
        indices, weights = _taps(image.shape[axis], new, kernel, antialias, corners)
        shape = [-1 if a == axis else 1 for a in range(3)]
        result = np.zeros([new if a == axis else n for a, n in enumerate(image.shape)], np.float32)
        for tap in range(indices.shape[1]):
            result += np.take(image, indices[:, tap], axis=axis) * weights[:, tap].reshape(shape)
        image = result
    return image


def other_ways(image: tuple[int, int], size: tuple[int, int]) -> Iterator[Resampling]:
    """The ways that make another tensor than ours of an image, the most frequent first.

    Args:
        image: (height, width) as decoded.
        size: (height, width) wanted.
    """
    if image == size:
        return
    for text, kernel, antialias, corners in _RESIZES:
        yield Resampling(text, _whole(kernel, antialias, corners))
    height, width = size
    for ratio in (1.0, 256 / 224, 232 / 224):
        short = round(min(size) * ratio)
        text = f"the shorter side resized to {short}, then a crop of the centre to {height} x {width}"
        for antialias in (True, False):
            resized = _once(_shorter_side(short, antialias))
            for down in (False, True):
                yield Resampling(text + ("" if antialias else ", without antialias"), _cropped(resized, down))
    for down in (False, True):
        yield Resampling("a crop of the centre without resizing", _cropped(lambda pixels: pixels, down))
    for where in ("around it", "below and to the right"):
        for antialias in (True, False):
            text = f"resized with its proportions kept and padded {where} (letterbox)"
            yield Resampling(
                text + ("" if antialias else ", without antialias"), _padded(where == "around it", antialias)
            )


_RESIZES = (
    ("bilinear without antialias, as cv2.INTER_LINEAR and interpolate(antialias=False) do", "bilinear", False, False),
    ("bicubic instead of bilinear, with antialias", "bicubic", True, False),
    ("bicubic without antialias, as cv2.INTER_CUBIC does, instead of bilinear", "bicubic", False, False),
    ("nearest neighbour instead of bilinear", "nearest", False, False),
    ("nearest neighbour, as cv2.INTER_NEAREST has it, instead of bilinear", "floor", False, False),
    ("area, as cv2.INTER_AREA, instead of bilinear", "area", True, False),
    ("Lanczos instead of bilinear", "lanczos", True, False),
    ("bilinear with align_corners, without antialias", "bilinear", False, True),
)


def _whole(kernel: str, antialias: bool, corners: bool) -> Callable[[Pixels, tuple[int, int]], Pixels]:
    return lambda pixels, size: resample(pixels, size, kernel, antialias, corners)


def _shorter_side(short: int, antialias: bool) -> Callable[[Pixels], Pixels]:
    def make(pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        # whole numbers as torchvision has them: the longer side is cut off, not rounded
        inner = (short, short * width // height) if height <= width else (short * height // width, short)
        return resample(pixels, inner, "bilinear", antialias)

    return make


def _once(make: Callable[[Pixels], Pixels]) -> Callable[[Pixels], Pixels]:
    """Remembers the last result, for an argument that stays the same object."""
    last: list[tuple[Pixels, Pixels]] = []

    def made(pixels: Pixels) -> Pixels:
        if not last or last[0][0] is not pixels:
            last[:] = [(pixels, make(pixels))]
        return last[0][1]

    return made


def _cropped(resized: Callable[[Pixels], Pixels], down: bool) -> Callable[[Pixels, tuple[int, int]], Pixels]:
    """Crops of the centre; half a pixel is rounded as torchvision does it, or down."""

    def make(pixels: Pixels, size: tuple[int, int]) -> Pixels:
        inner = resized(pixels)
        over = [have - want for have, want in zip(inner.shape[:2], size, strict=True)]
        if min(over) < 0:
            return np.full((*size, pixels.shape[2]), np.nan, np.float32)
        top, left = (n // 2 if down else round(n / 2) for n in over)
        return inner[top : top + size[0], left : left + size[1]]

    return make


def _padded(around: bool, antialias: bool) -> Callable[[Pixels, tuple[int, int]], Pixels]:
    def make(pixels: Pixels, size: tuple[int, int]) -> Pixels:
        factor = min(size[0] / pixels.shape[0], size[1] / pixels.shape[1])
        inner = (max(1, round(pixels.shape[0] * factor)), max(1, round(pixels.shape[1] * factor)))
        top, left = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2) if around else (0, 0)
        result = np.full((*size, pixels.shape[2]), np.nan, np.float32)  # what fills the rest is not known
        result[top : top + inner[0], left : left + inner[1]] = resample(pixels, inner, "bilinear", antialias)
        return result

    return make


def _taps(
    old: int, new: int, kernel: str, antialias: bool, corners: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Source pixels and weights of every target pixel, both [new, taps]."""
    factor = old / new
    targets = np.arange(new)
    if kernel in ("nearest", "floor"):
        chosen = np.floor((targets + (0.5 if kernel == "nearest" else 0.0)) * factor).astype(np.int64)
        return np.minimum(chosen, old - 1)[:, None], np.ones((new, 1), np.float32)
    centres = targets * (old - 1) / max(new - 1, 1) if corners else (targets + 0.5) * factor - 0.5
    stretch = max(factor, 1.0) if antialias else 1.0
    radius = {"area": 0.5 + 0.5 / stretch, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}[kernel] * stretch
    indices = np.ceil(centres - radius).astype(np.int64)[:, None] + np.arange(int(np.floor(2 * radius)) + 1)
    away = np.abs(indices - centres[:, None])
    if kernel == "area":  # how much of a source pixel the target pixel covers
        weights = np.clip(0.5 + stretch / 2 - away, 0.0, min(1.0, stretch))
    else:
        weights = _KERNELS[kernel](away / stretch, antialias)
    if antialias:
        weights[(indices < 0) | (indices >= old)] = 0  # as Pillow; without antialias the border is repeated
    weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, old - 1), weights.astype(np.float32)


def _bilinear(x: NDArray[np.float64], _: bool) -> NDArray[np.float64]:
    return np.maximum(1 - x, 0)


def _bicubic(x: NDArray[np.float64], antialias: bool) -> NDArray[np.float64]:
    a = -0.5 if antialias else -0.75  # Pillow and torch with antialias; OpenCV and torch without
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: NDArray[np.float64], _: bool) -> NDArray[np.float64]:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


_KERNELS: dict[str, Callable[[NDArray[np.float64], bool], NDArray[np.float64]]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "lanczos": _lanczos,
}
