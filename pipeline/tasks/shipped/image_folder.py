"""Image files in folders: one folder per class, with or without a folder per split above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgewright.edge_runtime.inference.image_file import SUFFIXES

from ...errors import DataError
from ...task import SplitName
from ..class_folders import class_folders, class_splits
from ..image_classification import ImageClassification
from ..image_files import ImageReader, check_image_arguments, common_white, image_preprocessing, images_in
from .augmentation import flip_and_crop


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
    names, by_split = class_folders(folder, images_in, ("image", sorted(SUFFIXES)), labels)
    if max_value is None:
        files = [file for classes in by_split.values() for found in classes.values() for file in found]
        max_value = common_white(files, workers)
    preprocessing = image_preprocessing(size, channels, mean, std, max_value)
    splits = class_splits(by_split, names, ImageReader(preprocessing, workers, memory_mb), fractions, seed)
    return ImageClassification(
        splits,
        names,
        preprocessing=preprocessing,
        augment=flip_and_crop(flip, crop_padding) if flip or crop_padding else None,
        metric=metric,
        name=folder.name or "image_folder",
    )
