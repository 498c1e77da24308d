"""Image files as the inputs of a task: read when they are needed, by the code that reads them on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.image_file import SUFFIXES, Depth, load_image, read_depth

from ..errors import DataError, EditedSourceError
from ..sources import content_digest
from ..stage import Progress
from ..task import Batch

_READ_AT_ONCE = 64
_TURNED = frozenset((5, 6, 7, 8))
"""Values of the EXIF orientation with which height and width change places."""
_ORIENTATION = 0x0112
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageReader:
    """Reads files with a few threads and turns images into inputs.

    Args:
        preprocessing: what `image_preprocessing` gives.
        workers: threads, at least one is used.
        memory_mb: of the inputs of a split that are kept.
    """

    def __init__(self, preprocessing: Preprocessing, workers: int = 4, memory_mb: int = 512) -> None:
        self.preprocessing = preprocessing
        self.memory_bytes = memory_mb * 2**20
        self.workers = max(1, workers)
        self._digests: dict[Path, bytes] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one input: channels, height, width."""
        assert self.preprocessing.size is not None
        return (self.preprocessing.channels, *self.preprocessing.size)

    def inputs(self, files: Sequence[Path]) -> list[NDArray[np.float32]]:
        """Inputs float32 [C, H, W] of images, in order."""
        with ThreadPoolExecutor(min(self.workers, max(1, len(files)))) as pool:
            return list(pool.map(self._input, files))

    def digests(self, files: Sequence[Path]) -> list[bytes]:
        """Hashes of the files' bytes, in order."""
        new = [file for file in files if file not in self._digests]
        with ThreadPoolExecutor(self.workers) as pool:
            self._digests.update(zip(new, pool.map(_file_digest, new), strict=True))
        return [self._digests[file] for file in files]

    def _input(self, file: Path) -> NDArray[np.float32]:
        try:
            batch = load_image(file, self.preprocessing)
        except InputError as error:
            raise DataError(str(error)) from error
        self.check_same(file)
        return np.asarray(batch[0], np.float32)

    def check_same(self, file: Path) -> None:
        """Refuses a file that was edited after its digest was taken.

        Raises:
            EditedSourceError: names it.
        """
        if self._digests.get(file, digest := _file_digest(file)) != digest:
            raise EditedSourceError(
                f"{file} is not the file any more that it was when the task was made: a run needs data that stay as "
                "they are; run again to begin with the file as it is now"
            )


class ImageFiles:
    """A split of image files; see `edgewright.pipeline.task.Split`.

    Args:
        files: one for each sample.
        targets: of any shape and dtype, [len, ...].
        reader: makes inputs of them.
    """

    def __init__(self, files: Sequence[Path], targets: Tensor, reader: ImageReader) -> None:
        self._files, self._targets, self._reader = list(files), targets, reader
        fits = 4 * len(files) * int(np.prod(reader.shape)) <= reader.memory_bytes
        self._kept: dict[int, NDArray[np.float32]] | None = {} if fits else None

    @property
    def targets(self) -> Tensor:
        """Of every sample, [len, ...]."""
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every file's bytes; reads all files once."""
        return self._reader.digests(self._files)

    @property
    def files(self) -> Sequence[Path]:
        """Where every sample comes from."""
        return self._files

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """See `edgewright.pipeline.task.FromFiles`."""
        return {file: digest.hex() for file, digest in zip(self._files, self.sample_digests, strict=True)}

    def __len__(self) -> int:
        return len(self._files)

    def read_all(self, progress: Progress, description: str) -> None:
        """Decodes every file once, and keeps the inputs where they fit into memory.

        Args:
            progress: shown how far it has come.
            description: what it shows.

        Raises:
            DataError: names a file that is no readable image.
        """
        starts = range(0, len(self), _READ_AT_ONCE)
        for start in progress.track(starts, description, len(starts)):
            self.batch(range(start, min(len(self), start + _READ_AT_ONCE)))

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`, float32 [N, C, H, W].

        Raises:
            DataError: names a file that cannot be read.
        """
        rows = [int(i) for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]
        kept = {} if self._kept is None else self._kept
        found = {row: kept[row] for row in rows if row in kept}
        needed = list(dict.fromkeys(row for row in rows if row not in found))
        read = dict(zip(needed, self._reader.inputs([self._files[row] for row in needed]), strict=True))
        found.update(read)
        if self._kept is not None:
            self._kept.update(read)
        inputs = np.stack([found[row] for row in rows]) if rows else np.zeros((0, *self._reader.shape), np.float32)
        return Batch((torch.from_numpy(inputs),), self._targets[torch.tensor(rows, dtype=torch.int64)])


def _file_digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(content_digest(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); repair it or remove it") from error


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
