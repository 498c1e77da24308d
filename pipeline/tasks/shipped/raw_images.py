"""A split of images of one size that lies in memory as bytes; inputs are made batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.inference.preprocess import preprocess_image

from ...task import Batch


class RawImages:
    """See `edgewright.pipeline.task.Split`; a quarter of the memory of float32 inputs."""

    def __init__(self, images: NDArray[np.uint8], targets: NDArray[Any], preprocessing: Preprocessing) -> None:
        """Keeps the data.

        Args:
            images: [len, H, W, channels].
            targets: [len, ...], kept as float32 if they are floats, else as int64.
            preprocessing: how an image becomes an input.
        """
        self._images = images
        kind = np.float32 if targets.dtype.kind == "f" else np.int64
        self._targets = torch.from_numpy(np.ascontiguousarray(targets, dtype=kind))
        self._preprocessing = preprocessing

    @property
    def images(self) -> NDArray[np.uint8]:
        """[len, H, W, channels]."""
        return self._images

    @property
    def targets(self) -> Tensor:
        """Of every sample, [len, ...]."""
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every image's bytes."""
        return image_digests(self._images)

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`, float32 [N, channels, height, width]."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(
            (torch.from_numpy(preprocess_image(self._images[rows.numpy()], self._preprocessing)),), self._targets[rows]
        )


def image_digests(images: NDArray[np.uint8]) -> list[bytes]:
    """A hash of every image in [N, H, W, channels]."""
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]


def moments(images: NDArray[np.uint8], chunk: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in 0 ... 1, in chunks of `chunk` images, 6 digits each."""
    total, squares = np.zeros(images.shape[3]), np.zeros(images.shape[3])
    for start in range(0, len(images), chunk):
        # sums of whole numbers are exact in float64, whatever the order
        pixels = images[start : start + chunk].astype(np.float64)
        total += pixels.sum(axis=(0, 1, 2))
        squares += np.square(pixels).sum(axis=(0, 1, 2))
    count = images.size / images.shape[3]
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple(round(float(m) / 255, 6) for m in mean), tuple(round(float(d) / 255, 6) for d in deviation)
