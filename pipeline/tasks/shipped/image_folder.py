"""Image files in folders: one folder per class, with or without a folder per split above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.image_file import SUFFIXES, Depth, load_image, read_depth
from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError, EditedSourceError
from ...sources import content_digest
from ...stage import Progress
from ...task import SPLITS, Batch, SplitName
from ..image_classification import ImageClassification
from ..splitting import stratified_split
from .augmentation import flip_and_crop

_SPLIT_FOLDERS: dict[str, SplitName] = {
    **{name: name for name in SPLITS},
    "val": "validation",
    "valid": "validation",
}
_READ_AT_ONCE = 64
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    path: str | Path,
    size: int | Sequence[int] = 224,
    *,
    channels: int = 3,
    max_value: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    crop_padding: int = 0,
    metric: str = "accuracy",
    workers: int = 4,
    memory_mb: int = 512,
) -> ImageClassification:
    """Classes by folder: ``path/CLASS/*.png``, or ``path/train|calibration|validation|test/CLASS/*.png``.

    Without split folders the files are dealt out by `seed` and content. With them, calibration, validation
    and test are cut out of train in the same way where their folder is missing.

    Every image is turned as its EXIF tag says, resized to `size` (the whole image, no crop, bilinear with antialias),
    divided by its white (255, or `max_value`), and normalised: exactly what `preprocessing` in the bundle makes the
    device do, by the same code. What becomes of colour, transparency, frames and depth, `edge_runtime.image_file` says.
    Files are read when needed.

    Args:
        path: the folder.
        size: side of the input in pixels, or (height, width).
        channels: 3 for RGB, 1 for grey; files are converted.
        max_value: the value that stands for white in files of more than 8 bits, e.g. 4095 for 12 bits that lie in files
            of 16; files of fewer bits keep their own white. Default what the headers say where all agree: 255 with 8
            bits, 65535 with 16. 32 bits and floats say nothing.
        mean: per channel, of pixels in 0 ... 1; default ImageNet's (grey: its mean over the channels).
        std: likewise.
        labels: class folders in the order of the model's logits; default sorted by name, as torchvision has
            it.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        flip: mirror half of the training images.
        crop_padding: move training images by up to so many pixels.
        metric: what tolerances are measured in: ``accuracy`` or ``balanced_accuracy``.
        workers: threads that read files.
        memory_mb: keep the inputs of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder, no images, a class without samples, or arguments that make no sense.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give the folder that holds one folder per class")
    _check_arguments(size, channels, max_value)
    presplit = _split_folders(folder)
    by_split: dict[SplitName, dict[str, list[Path]]] = {n: _classes_in(p) for n, p in presplit.items()}
    if not presplit:
        by_split["train"] = _classes_in(folder)
    names = _labels(by_split, labels, folder)
    if max_value is None:
        files = [file for classes in by_split.values() for found in classes.values() for file in found]
        max_value = _common_white(files, max(1, workers))
    preprocessing = _preprocessing(size, channels, mean, std, max_value)
    reader = _Reader(preprocessing, max(1, workers), memory_mb)
    samples = {name: _samples(classes, names) for name, classes in by_split.items()}
    shares: dict[SplitName, float] = dict(
        fractions or {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}
    )
    if not presplit:
        samples = _dealt_out(samples["train"], names, shares, seed, reader)
    elif "train" in samples and not samples.keys() >= shares.keys():
        cut: dict[SplitName, float] = {n: s for n, s in shares.items() if n == "train" or n not in samples}
        if "train" not in cut:
            raise DataError(f"fractions {shares} lack 'train', out of which {', '.join(cut)} is to be cut")
        samples.update(_dealt_out(samples["train"], names, cut, seed, reader))
    splits = {name: ImageFiles(rows, reader) for name, rows in samples.items()}
    return ImageClassification(
        splits,
        names,
        preprocessing=preprocessing,
        augment=flip_and_crop(flip, crop_padding) if flip or crop_padding else None,
        metric=metric,
        name=folder.name or "image_folder",
    )


@dataclass(frozen=True)
class _Sample:
    file: Path
    target: int


class _Reader:
    """Reads files with a few threads and turns images into inputs."""

    def __init__(self, preprocessing: Preprocessing, workers: int, memory_mb: int) -> None:
        self.preprocessing = preprocessing
        self.memory_bytes = memory_mb * 2**20
        self._workers = workers
        self._digests: dict[Path, bytes] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one input: channels, height, width."""
        assert self.preprocessing.size is not None
        return (self.preprocessing.channels, *self.preprocessing.size)

    def inputs(self, files: Sequence[Path]) -> list[NDArray[np.float32]]:
        """Inputs float32 [C, H, W] of images, in order."""
        with ThreadPoolExecutor(min(self._workers, max(1, len(files)))) as pool:
            return list(pool.map(self._input, files))

    def digests(self, files: Sequence[Path]) -> list[bytes]:
        """Hashes of the files' bytes, in order."""
        new = [file for file in files if file not in self._digests]
        with ThreadPoolExecutor(self._workers) as pool:
            self._digests.update(zip(new, pool.map(_file_digest, new), strict=True))
        return [self._digests[file] for file in files]

    def _input(self, file: Path) -> NDArray[np.float32]:
        try:
            batch = load_image(file, self.preprocessing)
        except InputError as error:
            raise DataError(str(error)) from error
        if self._digests.get(file, digest := _file_digest(file)) != digest:
            raise EditedSourceError(
                f"{file} is not the image any more that it was when the task was made: a run needs data that stay as "
                "they are; run again to begin with the file as it is now"
            )
        return np.asarray(batch[0], np.float32)


class ImageFiles:
    """A split of image files; see `edgewright.pipeline.task.Split`."""

    def __init__(self, samples: Sequence[_Sample], reader: _Reader) -> None:
        self._files = [sample.file for sample in samples]
        self._targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
        self._reader = reader
        fits = 4 * len(samples) * int(np.prod(reader.shape)) <= reader.memory_bytes
        self._kept: dict[int, NDArray[np.float32]] | None = {} if fits else None

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
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


def _common_white(files: Sequence[Path], workers: int) -> float | None:
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


def _check_arguments(size: int | Sequence[int], channels: int, max_value: float | None) -> None:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(f"size is {size!r}; it is the side in pixels, or [height, width]")
    if channels not in (1, 3):
        raise DataError(f"channels is {channels!r}; images are read with 3 (RGB) or 1 (grey)")
    is_number = isinstance(max_value, int | float) and not isinstance(max_value, bool)
    if max_value is not None and not (is_number and 0 < max_value <= 2**31 - 1):
        raise DataError(f"max_value is {max_value!r}; it is the pixel value that stands for white, e.g. 65535")


def _preprocessing(
    size: int | Sequence[int],
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    max_value: float | None,
) -> Preprocessing:
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


def _folders(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _split_folders(folder: Path) -> dict[SplitName, Path]:
    """Split -> its folder; empty if the folders are classes.

    A class may be called "train": only a folder of folders is a split.
    """
    inside = _folders(folder)
    found = {_SPLIT_FOLDERS[p.name]: p for p in inside if p.name in _SPLIT_FOLDERS and _folders(p)}
    if not found:
        return {}
    for place in inside:
        if found.get(_SPLIT_FOLDERS.get(place.name, "train")) != place:
            raise DataError(
                f"{folder} holds the split folder {next(iter(found.values())).name!r} and beside it "
                f"{place.name!r}"
                f"{did_you_mean(place.name, list(SPLITS))}, which is none or holds no class folders: use "
                f"{', '.join(SPLITS)}, each with one folder per class, or class folders only"
            )
    return {name: found[name] for name in SPLITS if name in found}


def _classes_in(place: Path) -> dict[str, list[Path]]:
    return {entry.name: sorted(_images_in(entry)) for entry in _folders(place)}


def _images_in(place: Path) -> Iterator[Path]:
    for file in place.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def _labels(
    by_split: Mapping[SplitName, Mapping[str, list[Path]]], labels: Sequence[str] | None, folder: Path
) -> list[str]:
    """Class names in the order of the logits; refuses classes without samples."""
    found = sorted({name for classes in by_split.values() for name in classes})
    if not found:
        raise DataError(f"{folder} holds no class folders: put the images of each class into a folder of its own")
    names = found if labels is None else [str(label) for label in labels]
    for name in found:
        if name not in names:
            raise DataError(
                f"{folder} has a folder for the class {name!r}{did_you_mean(name, names)}, which labels lacks"
            )
    for split, classes in by_split.items():
        for name in names:
            if not classes.get(name) and (name in classes or split == "train"):
                kinds = ", ".join(sorted(SUFFIXES))
                raise DataError(
                    f"class {name!r} has no image in {folder} (split {split!r}): add files ({kinds}), "
                    "or remove the class"
                )
    return names


def _samples(classes: Mapping[str, list[Path]], names: Sequence[str]) -> list[_Sample]:
    return [_Sample(file, target) for target, name in enumerate(names) for file in classes.get(name, [])]


def _dealt_out(
    samples: Sequence[_Sample],
    names: Sequence[str],
    fractions: Mapping[SplitName, float],
    seed: int,
    reader: _Reader,
) -> dict[SplitName, list[_Sample]]:
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    digests = reader.digests([sample.file for sample in samples])
    rows = stratified_split(digests, targets, names, fractions, seed)
    return {name: [samples[row] for row in chosen] for name, chosen in rows.items()}
