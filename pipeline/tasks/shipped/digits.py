"""The scanned digits of scikit-learn: 1,797 images of 8x8 pixels, 10 classes, in the wheel."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.inference.preprocess import preprocess_image

from ...errors import DataError
from ...task import SplitName
from ..image_classification import ImageClassification
from ..splits import TensorSplit
from ..splitting import stratified_split
from .augmentation import random_affine


def digits(
    seed: int = 0,
    size: int = 32,
    augment: bool = True,
    fractions: Mapping[SplitName, float] | None = None,
) -> ImageClassification:
    """Digits upscaled to [1, size, size], normalised with the train split's mean and standard deviation.

    The images are uint8 with 0 as background; `preprocessing` says how they become inputs, so a device given
    an image of any size computes the same.

    Args:
        seed: of the split.
        size: side of the input in pixels.
        augment: small turns, moves and zooms of the training batches.
        fractions: share of each split, default train 0.6, calibration 0.05, validation 0.15, test 0.2.

    Raises:
        DataError: scikit-learn is not installed, or the arguments make no sense.
    """
    if not isinstance(size, int) or size < 8:
        raise DataError(f"size is {size!r}; it is the side of the input in pixels, at least 8")
    fractions = fractions or {"train": 0.6, "calibration": 0.05, "validation": 0.15, "test": 0.2}
    if "train" not in fractions:
        raise DataError(f"fractions {dict(fractions)} lack 'train', whose mean and deviation normalise the images")
    images, targets = raw_digits()
    labels = [str(i) for i in range(10)]
    rows = stratified_split(
        [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images],
        torch.from_numpy(targets),
        labels,
        fractions,
        seed,
    )
    plain = Preprocessing("image", (size, size), 1, 1.0 / 255.0)
    train = preprocess_image(images[rows["train"]], plain).astype(np.float64)
    preprocessing = dataclasses.replace(
        plain, mean=(round(float(train.mean()), 6),), std=(round(float(train.std()), 6),)
    )
    splits = {
        name: TensorSplit([preprocess_image(images[chosen], preprocessing)], targets[chosen])
        for name, chosen in rows.items()
    }
    return ImageClassification(
        splits,
        labels,
        preprocessing=preprocessing,
        augment=random_affine() if augment else None,
        name="digits",
    )


def raw_digits() -> tuple[
    np.ndarray[tuple[int, ...], np.dtype[np.uint8]], np.ndarray[tuple[int, ...], np.dtype[np.int64]]
]:
    """All images, uint8 [1797, 8, 8, 1], and their classes, int64 [1797].

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    return np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[..., None], bunch.target.astype(np.int64)
