"""Image files in folders: one folder per class, with or without a folder per split above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgewright.edge_runtime.inference.image_file import SUFFIXES
from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError
from ...task import SPLITS, SplitName
from ..image_classification import ImageClassification
from ..image_files import ImageFiles, ImageReader, check_image_arguments, common_white, image_preprocessing, images_in
from ..splitting import stratified_split
from .augmentation import flip_and_crop

_SPLIT_FOLDERS: dict[str, SplitName] = {
    **{name: name for name in SPLITS},
    "val": "validation",
    "valid": "validation",
}


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
    check_image_arguments(size, channels, max_value)
    presplit = _split_folders(folder)
    by_split: dict[SplitName, dict[str, list[Path]]] = {n: _classes_in(p) for n, p in presplit.items()}
    if not presplit:
        by_split["train"] = _classes_in(folder)
    names = _labels(by_split, labels, folder)
    if max_value is None:
        files = [file for classes in by_split.values() for found in classes.values() for file in found]
        max_value = common_white(files, workers)
    preprocessing = image_preprocessing(size, channels, mean, std, max_value)
    reader = ImageReader(preprocessing, workers, memory_mb)
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
    splits = {name: _files(rows, reader) for name, rows in samples.items()}
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
    return {entry.name: sorted(images_in(entry)) for entry in _folders(place)}


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


def _files(samples: Sequence[_Sample], reader: ImageReader) -> ImageFiles:
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    return ImageFiles([sample.file for sample in samples], targets, reader)


def _samples(classes: Mapping[str, list[Path]], names: Sequence[str]) -> list[_Sample]:
    return [_Sample(file, target) for target, name in enumerate(names) for file in classes.get(name, [])]


def _dealt_out(
    samples: Sequence[_Sample],
    names: Sequence[str],
    fractions: Mapping[SplitName, float],
    seed: int,
    reader: ImageReader,
) -> dict[SplitName, list[_Sample]]:
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    digests = reader.digests([sample.file for sample in samples])
    rows = stratified_split(digests, targets, names, fractions, seed)
    return {name: [samples[row] for row in chosen] for name, chosen in rows.items()}
