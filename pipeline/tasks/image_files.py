"""Image files as the inputs of a task: read when they are needed, by the code that reads them on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.image_file import SUFFIXES, Depth, load_image, read_depth

from ..errors import DataError
from .input_files import FileReader

_TURNED = frozenset((5, 6, 7, 8))
"""Values of the EXIF orientation with which height and width change places."""
_ORIENTATION = 0x0112
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageReader(FileReader):
    """Turns image files into inputs [C, H, W]; `preprocessing` is what `image_preprocessing` gives."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one input: channels, height, width."""
        assert self.preprocessing.size is not None
        return (self.preprocessing.channels, *self.preprocessing.size)

    def read(self, file: Path) -> NDArray[np.float32]:
        """One input, float32 [C, H, W].

        Raises:
            InputError: it is no readable image.
        """
        return np.asarray(load_image(file, self.preprocessing)[0], np.float32)


def common_white(files: Sequence[Path], workers: int = 4) -> float | None:
    """The value of white that all files have by their headers; None with 8 bits.

    Raises:
        DataError: names files that have different ones, or one that does not say.
    """
    first: dict[Depth, Path] = {}
    with ThreadPoolExecutor(workers) as pool:
        for file, depth in zip(files, pool.map(_depth_of, files), strict=True):
            if depth is not None:
                first.setdefault(depth, file)
    for depth, file in first.items():
        if depth.white is None:
            raise DataError(
                f"{file} has {depth.text} pixels, and does not say which value stands for white: give `max_value`, "
                "the largest value that the files can have"
            )
    if len(first) > 1:
        (one, a), (other, b), *_ = sorted(first.items(), key=lambda item: item[0].white or 0.0)
        raise DataError(
            f"{a} has {one.text} pixels and {b} {other.text} ones: give `max_value`, the value that stands for white "
            "in the deeper ones (65535 where they use all 16 bits), and the others are stretched to it; or convert them"
        )
    white = next(iter(first)).white if first else None
    return None if white == 255 else white


def _depth_of(file: Path) -> Depth | None:
    try:
        return read_depth(file)
    except InputError:
        return None  # refused by name when it is read


def check_image_arguments(size: int | Sequence[int], channels: int, max_value: float | None) -> None:
    """Refuses sizes, channels and values of white that make no sense.

    Raises:
        DataError: says what is meant.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(f"size is {size!r}; it is the side in pixels, or [height, width]")
    if channels not in (1, 3):
        raise DataError(f"channels is {channels!r}; images are read with 3 (RGB) or 1 (grey)")
    is_number = isinstance(max_value, int | float) and not isinstance(max_value, bool)
    if max_value is not None and not (is_number and 0 < max_value <= 2**31 - 1):
        raise DataError(f"max_value is {max_value!r}; it is the pixel value that stands for white, e.g. 65535")


def image_preprocessing(
    size: int | Sequence[int],
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_value: float | None = None,
) -> Preprocessing:
    """How image files become inputs, in training and on the device.

    Args:
        size: side of the input in pixels, or (height, width).
        channels: 3 for RGB, 1 for grey.
        mean: per channel, of pixels in 0 ... 1; None: ImageNet's (grey: its mean over the channels).
        std: likewise.
        max_value: the pixel value that stands for white; None: 255.

    Raises:
        DataError: arguments that make no sense.
    """
    check_image_arguments(size, channels, max_value)
    height, width = (size, size) if isinstance(size, int) else size
    if mean is None:
        mean = _IMAGENET_MEAN if channels == 3 else (sum(_IMAGENET_MEAN) / 3,)
    if std is None:
        std = _IMAGENET_STD if channels == 3 else (sum(_IMAGENET_STD) / 3,)
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise DataError(f"mean {list(mean)} and std {list(std)} need {channels} numbers each, those of std above 0")
    white = None if max_value is None else float(max_value)
    return Preprocessing(
        "image",
        (height, width),
        channels,
        1.0 / (white or 255.0),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        max_value=white,
    )


def images_in(place: Path) -> Iterator[Path]:
    """Image files below a folder, hidden ones left out, in no order."""
    for file in place.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def size_of_image(file: Path) -> tuple[int, int]:
    """Height and width as the reader gives them, by the header alone, turned as the EXIF tag says.

    Raises:
        DataError: it is no readable image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{file} is no readable image ({error}): repair it or remove it") from error
    return (width, height) if turned else (height, width)
