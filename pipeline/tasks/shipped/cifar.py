"""CIFAR-10 and CIFAR-100 in the original binary format, read from a folder that the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...errors import DataError
from ...sources import content_digest, sha256_of
from ...task import SplitName
from ..image_classification import ImageClassification
from ..splitting import stratified_split
from .augmentation import flip_and_crop
from .raw_images import RawImages, image_digests

_SIDE, _CHANNELS = 32, 3
_PIXELS = _CHANNELS * _SIDE * _SIDE
_MEAN, _STD = (0.4915, 0.4821, 0.4464), (0.2470, 0.2435, 0.2616)
_FRACTIONS: Mapping[SplitName, float] = {"train": 0.8, "calibration": 0.02, "validation": 0.18}


@dataclass(frozen=True)
class _Format:
    """One of the two data sets: its files, and the bytes in front of every image.

    Attributes:
        folder: that the archive unpacks to.
        train, test: files of rows.
        classes: label names: file and their number, per byte in front of an image.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: tuple[tuple[str, int], ...]

    @property
    def row_bytes(self) -> int:
        return len(self.classes) + _PIXELS


_FORMATS = (
    _Format(
        "CIFAR-10",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        (("batches.meta.txt", 10),),
    ),
    _Format(
        "CIFAR-100",
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        (("coarse_label_names.txt", 20), ("fine_label_names.txt", 100)),
    ),
)


def cifar(
    path: str,
    classes: int | None = None,
    seed: int = 0,
    fractions: Mapping[SplitName, float] | None = None,
    augment: bool = True,
    sha256: Mapping[str, str] | None = None,
) -> ImageClassification:
    """The images [3, 32, 32], normalised and augmented as published: zero padding by 4, random crop, flip.

    Test is the test file. Train, calibration and validation are dealt out of the training files by `seed` and content;
    training images that are byte for byte in the test file are left out, and counted in `provenance`.

    Args:
        path: the folder with the ``.bin`` files, or the one that holds ``cifar-10-batches-bin`` or
            ``cifar-100-binary``.
        classes: 10 or 100, or 20 for the coarse labels of CIFAR-100; default all that the files have.
        seed: of the split.
        fractions: shares of the training files, default train 0.8, calibration 0.02, validation 0.18.
        augment: crop and flip training batches.
        sha256: file name -> expected hash; a file that differs is refused.

    Raises:
        DataError: a file is missing, damaged or not the expected one, or the arguments make no sense.
    """
    folder, form = _located(Path(path), classes)
    column = _column(form, classes)
    read = {folder / name: content_digest(folder / name) for name in _files(form)}
    digests = {name: sha256_of(folder / name) for name in (*form.train, *form.test)}
    for name, expected in (sha256 or {}).items():
        if digests.get(name) != expected.lower():
            raise DataError(f"{folder / name}: sha256 is {digests.get(name)}, expected {expected}: download it again")
    labels = _labels(folder, *form.classes[column])
    train_images, train_targets = _rows(folder, form.train, form, column)
    test_images, test_targets = _rows(folder, form.test, form, column)
    shares = dict(_FRACTIONS if fractions is None else fractions)
    if "train" not in shares or "test" in shares:
        raise DataError(f"fractions {shares} divide the training files: they need 'train' and cannot have 'test'")
    known = set(image_digests(test_images))
    hashes = image_digests(train_images)
    fresh = [row for row, digest in enumerate(hashes) if digest not in known]
    dealt = stratified_split(
        [hashes[row] for row in fresh], torch.from_numpy(train_targets[fresh]), labels, shares, seed
    )
    preprocessing = Preprocessing("image", (_SIDE, _SIDE), _CHANNELS, 1.0 / 255.0, _MEAN, _STD)
    splits = {
        name: RawImages(train_images[chosen], train_targets[chosen], preprocessing)
        for name, rows in dealt.items()
        for chosen in [[fresh[row] for row in rows]]
    }
    splits["test"] = RawImages(test_images, test_targets, preprocessing)
    black = tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True))
    return ImageClassification(
        splits,
        labels,
        preprocessing=preprocessing,
        augment=flip_and_crop(True, 4, black) if augment else None,
        name=form.name.lower(),
        provenance={"files": digests, "left_out_because_in_test": len(hashes) - len(fresh)},
        file_digests=read,
    )


def _located(path: Path, classes: int | None) -> tuple[Path, _Format]:
    """The folder with the files, and which of the two data sets it is."""
    wanted = [form for form in _FORMATS if classes is None or any(classes == count for _, count in form.classes)]
    if not wanted:
        raise DataError(f"classes is {classes}: 10, 100, or 20 for the coarse labels of CIFAR-100")
    found = [
        (folder, form)
        for form in wanted
        for folder in (path, path / form.folder)
        if any((folder / name).is_file() for name in (*form.train, *form.test))
    ]
    if len(found) != 1:
        names = " or ".join(f"{form.folder} ({form.train[0]}, ...)" for form in wanted)
        reason = "holds both data sets: set classes" if found else f"holds no {names}: unpack the binary version there"
        raise DataError(f"{path} {reason}")
    folder, form = found[0]
    for name in _files(form):
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}, which the binary version of {form.name} has: unpack it again")
    return folder, form


def _files(form: _Format) -> tuple[str, ...]:
    return (*form.train, *form.test, *(names for names, _ in form.classes))


def _column(form: _Format, classes: int | None) -> int:
    """Which byte in front of an image is its class."""
    counts = [count for _, count in form.classes]
    return len(counts) - 1 if classes is None else counts.index(classes)


def _labels(folder: Path, file: str, count: int) -> list[str]:
    labels = [line.strip() for line in (folder / file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(labels) != count:
        raise DataError(f"{folder / file} names {len(labels)} classes and there should be {count}: unpack it again")
    return labels


def _rows(
    folder: Path, files: Sequence[str], form: _Format, column: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [N, 32, 32, 3] and classes int64 [N] of several files."""
    images, targets = [], []
    for name in files:
        file = folder / name
        size = file.stat().st_size
        if size == 0 or size % form.row_bytes:
            raise DataError(
                f"{file} has {size} bytes, which is no whole number of rows of {form.row_bytes}: it is truncated or "
                f"not the binary version of {form.name}; download it again"
            )
        rows = np.fromfile(file, np.uint8).reshape(-1, form.row_bytes)
        for place, (_, count) in enumerate(form.classes):
            if int(rows[:, place].max()) >= count:
                row = int(rows[:, place].argmax())
                raise DataError(f"{file}: row {row} has class {int(rows[row, place])} of {count}: download it again")
        pixels = rows[:, len(form.classes) :].reshape(-1, _CHANNELS, _SIDE, _SIDE)
        images.append(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))
        targets.append(rows[:, column].astype(np.int64))
    return np.concatenate(images), np.concatenate(targets)
