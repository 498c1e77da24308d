"""What is behind a tensor that is not ours: the simplest way from the image file to it among those that people go.

A way is a decoding (channels, orientation, transparency), a resizing (`resampling`), an order of axes, and an affine
map of the values. The first three are tried, those with the fewest differences from ours first; the map of the values
is fitted to each, per channel, and then recognised.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import APPLIED, IGNORED, Preprocessing
from ..inference.image_file import describe, read_image
from ..inference.preprocess import preprocessing_steps, resize_bilinear
from .resampling import Pixels, Resampling, other_ways

LARGEST_OFF, MEAN_OFF = 1.5, 0.6
"""In grey levels, 255 of which make white: what rounding to whole levels, once for each axis, may change."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Way:
    """A way from the file to a tensor: at which steps it differs from ours, and how far its end is from the tensor."""

    causes: Mapping[str, str]
    """step -> in what it differs; without the steps that are ours."""
    largest: float
    """largest distance in grey levels."""
    mean: float

    @property
    def explains(self) -> bool:
        """Whether no more than rounding is left."""
        return self.largest <= LARGEST_OFF and self.mean <= MEAN_OFF


def explain(tensor: NDArray[np.float32], path: Path, preprocessing: Preprocessing) -> Way | None:
    """The simplest known way that ends in `tensor`, else the nearest one; None: no way has its shape.

    Args:
        tensor: of one image, without the batch axis.
        path: the image file.
        preprocessing: ours.
    """
    files, channels = list(_files(path, preprocessing)), list(_channels(preprocessing))
    resized = _Resized(preprocessing)
    combinations = [
        (sum(map(bool, (file.cause, mixed.cause, way, view.cause))), view, file, mixed, way)
        for view in _views(tensor, preprocessing)
        for file in files
        for mixed in channels
        for way in range(resized.count(file, view))
    ]
    nearest: tuple[float, Callable[[int], tuple[Way, bool]]] | None = None
    unrecognised: Way | None = None
    for _, view, file, mixed, way in sorted(combinations, key=lambda combination: combination[0]):
        text, pixels = resized(file, view, way)
        decoded = "; and ".join(filter(None, (file.cause, mixed.cause)))
        causes = {"decoded": decoded, "resized": text, "layout": view.cause}
        differences = {step: cause for step, cause in causes.items() if cause}
        fit = functools.partial(_fitted, view.values, pixels, mixed, preprocessing, differences)
        at_a_glance, _ = fit(_GLANCE)
        if at_a_glance.explains:
            found, recognised = fit(1)
            if found.explains and recognised:
                return found
            if found.explains and unrecognised is None:
                unrecognised = found
        if nearest is None or at_a_glance.mean < nearest[0]:
            nearest = at_a_glance.mean, fit
    if unrecognised is not None or nearest is None:
        return unrecognised
    return nearest[1](1)[0]


_GLANCE = 3
"""Every so manyth pixel along both axes is looked at first: a way that does not fit those fits no others."""


@dataclass(frozen=True)
class _File:
    """One way to read the file, before its channels are mixed; in colour where it has colours."""

    pixels: Pixels
    cause: str


@dataclass(frozen=True)
class _Channels:
    """One way from the colours of the file to the channels of the tensor."""

    weights: NDArray[np.float32] | None
    """[colours, channels]; None: as they are."""
    cause: str

    def of(self, pixels: Pixels) -> Pixels:
        """[H, W, colours] -> [H, W, channels]; linear, so that it may come after a resizing."""
        return pixels if self.weights is None else np.asarray(pixels @ self.weights, np.float32)


@dataclass(frozen=True)
class _View:
    values: Pixels
    """[height, width, C]."""
    cause: str


def _files(path: Path, ours: Preprocessing) -> Iterator[_File]:
    _, turn, alpha = describe(path)
    plain = _colours(path, ours)
    yield _File(plain, "")
    if turn != 1:
        other = IGNORED if ours.orientation == APPLIED else APPLIED
        text = f"the EXIF orientation {turn} was {other}, ours is {ours.orientation}"
        yield _File(_colours(path, dataclasses.replace(ours, orientation=other)), text)
    if alpha is not None and alpha.shape == plain.shape[:2]:
        opaque = alpha[:, :, None]
        for name, ground in (("white", ours.max_value or 255.0), ("black", 0.0)):
            text = f"transparent pixels were laid on {name}, ours drops the transparency"
            yield _File(plain * opaque + np.float32(ground) * (1 - opaque), text)
    if ours.max_value is not None and ours.max_value > 255:
        yield _File(np.minimum(plain, 255), "pixels beyond 255 were cut off, as Pillow's convert('L') does")


def _colours(path: Path, preprocessing: Preprocessing) -> Pixels:
    in_colour = dataclasses.replace(preprocessing, channels=3)
    _, pixels = next(iter(preprocessing_steps(read_image(path, in_colour), in_colour)))
    first: Pixels = pixels[0]
    return first


def _channels(ours: Preprocessing) -> Iterator[_Channels]:
    luma = np.array([[0.299], [0.587], [0.114]], np.float32)
    if ours.channels == 1:
        yield _Channels(luma, "")
        yield _Channels(luma[::-1], "the grey of BGR taken for RGB")
        yield _Channels(np.full((3, 1), 1 / 3, np.float32), "the grey is the mean of red, green and blue")
        return
    yield _Channels(None, "")
    text = "red and blue are swapped (BGR, as cv2.imread gives it): cv2.cvtColor(image, cv2.COLOR_BGR2RGB)"
    yield _Channels(np.eye(3, dtype=np.float32)[::-1], text)
    yield _Channels(np.repeat(luma, 3, axis=1), "the image was made grey, the model takes its colours")


def _views(tensor: NDArray[np.float32], ours: Preprocessing) -> Iterator[_View]:
    """`tensor` as [height, width, C], in the ways its axes may lie."""
    channels = ours.channels
    if tensor.ndim == 2 and channels == 1:
        tensor = tensor[None]
    if tensor.ndim != 3:
        return
    orders = {
        (1, 2, 0): "",
        (0, 1, 2): "channels last [H, W, C], the model takes [C, H, W]: transpose(2, 0, 1)",
        (2, 1, 0): "width before height [C, W, H], the model takes [C, H, W]",
        (1, 0, 2): "width before height and channels last [W, H, C], the model takes [C, H, W]",
    }
    for order, text in orders.items():
        values = tensor.transpose(order)
        note = _CHANNEL_NOTES.get((values.shape[2], channels))
        if note is None:
            continue
        cause = "; ".join(filter(None, (note, text)))
        fitting = np.repeat(values, 3, axis=2) if values.shape[2] < channels else values[:, :, :channels]
        yield _View(fitting, cause)
        if not text:
            for axes, how in (((0,), "upside down"), ((1,), "mirrored"), ((0, 1), "upside down and mirrored")):
                yield _View(np.flip(fitting, axes), "; ".join(filter(None, (cause, f"the image is {how}"))))
    if tensor.shape[0] == channels > 1:
        text = "[H, W, C] was reshaped to [C, H, W], which mixes the pixels: transpose(2, 0, 1) instead"
        yield _View(np.ascontiguousarray(tensor).reshape(*tensor.shape[1:], channels), text)


_CHANNEL_NOTES = {
    (3, 3): "",
    (1, 1): "",
    (4, 3): "a fourth channel (transparency), the model takes 3",
    (1, 3): "one channel, the model takes 3",
    (3, 1): "three channels, the model takes 1",
}
"""Channels of the tensor and of the model -> what differs."""


class _Resized:
    """Read files at the size of a view, each made once."""

    def __init__(self, ours: Preprocessing) -> None:
        self._ours = ours
        self._made: dict[tuple[int, tuple[int, int], int], tuple[str, Pixels]] = {}

    def count(self, file: _File, view: _View) -> int:
        """How many ways lead from the file to the view's size."""
        return 1 + len(self._ways(file, view))

    def __call__(self, file: _File, view: _View, way: int) -> tuple[str, Pixels]:
        """In what a way differs from ours, and its pixels; way 0 is ours, but for the size."""
        size, stored = (view.values.shape[0], view.values.shape[1]), file.pixels.shape[:2]
        key = id(file), size, way
        if key not in self._made:
            wanted = self._ours.size or stored
            other = "" if size == wanted else f"to {size[0]} x {size[1]}, the model takes {wanted[0]} x {wanted[1]}"
            if way > 0:
                chosen = self._ways(file, view)[way - 1]
                self._made[key] = "; ".join(filter(None, (chosen.text, other))), chosen.make(file.pixels, size)
            elif size == stored:
                self._made[key] = f"not resized: {other}" if other else "", file.pixels
            else:
                self._made[key] = other, resize_bilinear(file.pixels[None], size)[0]
        return self._made[key]

    def _ways(self, file: _File, view: _View) -> Sequence[Resampling]:
        height, width, _ = file.pixels.shape
        return list(other_ways((height, width), (view.values.shape[0], view.values.shape[1])))


def _fitted(
    values: Pixels, pixels: Pixels, mixed: _Channels, ours: Preprocessing, causes: Mapping[str, str], stride: int
) -> tuple[Way, bool]:
    """The way with the map of values that fits best, and whether that map is one that we know."""
    level = (ours.max_value or 255.0) / 255
    values, pixels = values[::stride, ::stride], mixed.of(pixels[::stride, ::stride])
    known = ~np.isnan(pixels).any(axis=2)
    if not known.any():
        return Way(causes, np.inf, np.inf), False
    x, y = pixels[known].astype(np.float64), values[known].astype(np.float64)
    ours_a, _ = _affine(ours)
    spread = x.std(axis=0)
    flat = spread < 1e-6 * level
    covariance = ((x - x.mean(axis=0)) * (y - y.mean(axis=0))).mean(axis=0)
    a = np.where(flat, 0.0, covariance / np.where(flat, 1.0, spread) ** 2)
    b = y.mean(axis=0) - a * x.mean(axis=0)
    unit = np.abs(np.where(flat, ours_a, a)) * level
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.nan_to_num(np.abs(y - (a * x + b)) / unit, nan=np.inf)
    largest, mean = float(off.max()), float(off.mean())
    ends = np.stack([x.min(axis=0), x.max(axis=0)])
    for known_a, known_b, texts in _known_maps(ours):
        apart = np.abs(ends * (a - known_a) + b - known_b) / (np.abs(known_a) * level)
        if apart.max() <= LARGEST_OFF:
            return Way({**causes, **texts}, largest, mean), True
    return Way({**causes, **_as_statistics(a, b, ours)}, largest, mean), False


_Map = tuple[NDArray[np.float64], NDArray[np.float64]]


def _affine(ours: Preprocessing) -> _Map:
    """Our values are pixel * a + b, per channel."""
    mean, std = _statistics(ours)
    return ours.scale / std, -mean / std


def _statistics(ours: Preprocessing) -> _Map:
    ones = np.ones(ours.channels)
    return np.array(ours.mean) if ours.mean else 0 * ones, np.array(ours.std) if ours.std else ones


def _known_maps(ours: Preprocessing) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], Mapping[str, str]]]:
    """Maps of values that people have, ours first: a, b and in what they differ by step."""
    mean, std = _statistics(ours)
    sets = [("", mean, std), ("0.5 was taken (values from -1 to 1)", 0 * mean + 0.5, 0 * std + 0.5)]
    if ours.channels == 3:
        imagenet = np.array(_IMAGENET)
        sets += [
            ("taken in the order of BGR", mean[::-1], std[::-1]),
            ("ImageNet's was taken", imagenet[0], imagenet[1]),
            ("ImageNet's was taken, in the order of BGR", imagenet[0, ::-1], imagenet[1, ::-1]),
        ]
    for note, m, d in sets:
        no_mean = {"mean": f"the mean {_list(mean)} was not subtracted"} if mean.any() else {}
        no_std = {"std": f"not divided by the standard deviation {_list(std)}"} if (std != 1).any() else {}
        other_mean = {"mean": f"{note}, the model has {_list(mean)}"} if note and (m != mean).any() else {}
        other_std = {"std": f"{note}, the model has {_list(std)}"} if note and (d != std).any() else {}
        for a, b, scaled, has_mean, has_std in _forms(ours, m, d):
            texts = {"mean": has_mean} if isinstance(has_mean, str) else other_mean if has_mean else no_mean
            yield a, b, {**scaled, **texts, **(other_std if has_std else no_std)}


def _forms(
    ours: Preprocessing, m: NDArray[np.float64], d: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], Mapping[str, str], bool | str, bool]]:
    """Ways to use a mean and a standard deviation: a, b, what is wrong with the scale, and whether each was used."""
    s, white = ours.scale, ours.max_value or 255.0
    one, zero = np.ones(ours.channels), np.zeros(ours.channels)
    undivided = {"scaled": f"pixels were left in 0 ... {white:g}: divide them by {white:g}"}
    twice = {"scaled": f"pixels were divided by {white:g} twice"}
    inverted = {"scaled": "black and white are swapped (1 - x)"}
    yield s / d, -m / d, {}, True, True
    yield s * one, zero, {}, False, False
    yield one, zero, undivided, False, False
    yield s * one, -m, {}, True, False
    yield s / d, zero, {}, False, True
    yield 1 / d, -m / d, undivided, True, True
    yield one, -m / s, undivided, f"{_list(m / s)} was subtracted, before a scale", False
    yield one, -m, undivided, True, False
    yield s / d, -m, {}, "subtracted after the division by the standard deviation, not before", True
    yield s * s / d, -m / d, twice, True, True
    yield s * s * one, zero, twice, False, False
    if white != 255:
        as_bytes = {"scaled": f"pixels were divided by 255: divide them by {white:g}"}
        yield one / 255, zero, as_bytes, False, False
        yield 1 / d / 255, -m / d, as_bytes, True, True
    yield -s / d, (1 - m) / d, inverted, True, True
    yield -s * one, one, inverted, False, False


def _as_statistics(a: NDArray[np.float64], b: NDArray[np.float64], ours: Preprocessing) -> dict[str, str]:
    """A map that nobody is known to have, as a mean and a standard deviation after our scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        std = ours.scale / a
        mean = -b * std
    m, d = _statistics(ours)
    causes = {}
    if not np.allclose(mean, m, rtol=0.01, atol=0.005):
        causes["mean"] = f"as if the mean were {_list(mean)}, the model has {_list(m)}"
    if not np.allclose(std, d, rtol=0.01):
        causes["std"] = f"as if the standard deviation were {_list(std)}, the model has {_list(d)}"
    return causes


def _list(values: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
