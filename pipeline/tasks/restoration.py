"""The task of giving an image back: without noise, larger, or as it was before an autoencoder saw it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchmetrics.functional.image as theirs
from torch import Tensor, nn

from edgewright.edge_runtime.answers.image import IMAGE
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import Answer, Metric, Score
from ..task import Split, SplitName
from .array_task import ArrayTask, Augmentation

_OUTPUT = "restored"
_MOST_DB = 100.0
_SSIM_WINDOW = 11


@dataclass(frozen=True)
class Degradation:
    """What is done to an image before the model sees it.

    Attributes:
        scale: height and width are divided by this, each pixel the mean of a square.
        noise: standard deviation of what is added after that, of pixels in 0 ... 1; the result stays in there.
        seed: of the noise, which also depends on the image.
    """

    scale: int = 1
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < 1:
            raise DataError(f"scale is {self.scale!r}: give the whole number that the image grows by, 2 say")
        if not (math.isfinite(self.noise) and 0.0 <= self.noise < 1.0):
            raise DataError(f"noise is {self.noise!r}: give the standard deviation of pixels in 0 ... 1, 0.1 say")

    def applied(self, images: Tensor, digests: Sequence[bytes]) -> Tensor:
        """The same noise for the same image, whatever batch it is in.

        Args:
            images: float32 [N, C, H, W] in 0 ... 1.
            digests: of every image's content.
        """
        found = nn.functional.avg_pool2d(images, self.scale) if self.scale > 1 else images
        if self.noise == 0.0:
            return found
        noise = torch.empty_like(found)
        for row, digest in enumerate(digests):
            number = hashlib.blake2b(digest, digest_size=7, key=str(self.seed).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(number, "big"))
            noise[row] = torch.randn(found.shape[1:], generator=generator)
        return (found + self.noise * noise).clamp(0.0, 1.0)


class Restoration(ArrayTask):
    """An image for each image: pixels [N, C, H, W] in 0 ... 1, trained by the mean absolute error.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of float32 arrays, targets [N, 1 or 3, H, W].
        loss: ``l1`` or ``mse``.
        metric: ``psnr`` (dB, mean over the images; a drop is the share that is lost), ``ssim`` (a drop is the
            difference), or your own.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only; moves inputs and targets alike.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split, loss or metric.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        *,
        loss: str = "l1",
        metric: str | Metric = "psnr",
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "restoration",
        input_name: str | Sequence[str] = "image",
        provenance: Mapping[str, Any] | None = None,
        file_digests: Mapping[Path, str] | None = None,
    ) -> None:
        super().__init__(
            splits,
            preprocessing=preprocessing,
            augment=augment,
            name=name,
            input_name=input_name,
            provenance=provenance,
            file_digests=file_digests,
        )
        if loss not in ("l1", "mse"):
            raise DataError(f"unknown loss {loss!r}; there are l1 and mse")
        self._loss = nn.functional.l1_loss if loss == "l1" else nn.functional.mse_loss
        if isinstance(metric, str) and metric not in ("psnr", "ssim"):
            raise DataError(f"unknown metric {metric!r}; there are psnr and ssim, or pass an object that is a Metric")
        self._metric = ImageQuality(metric) if isinstance(metric, str) else metric

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: an image."""
        return (AnswerSpec(_OUTPUT, IMAGE),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean error of all pixels.

        Raises:
            DataError: the output has another shape than the targets.
        """
        _check_shapes(output, targets)
        return self._loss(output, targets)

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric


class ImageQuality:
    """Peak signal to noise ratio in dB (100 at most), or structural similarity; of torchmetrics, mean over the images.

    Args:
        name: ``psnr`` or ``ssim``.
    """

    def __init__(self, name: str) -> None:
        self.name: str = name

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; what lies beyond black and white is cut off first, as `predict` does."""
        parts = [torch.zeros(0)]
        for output, targets in answers:
            assert isinstance(output, Tensor)
            _check_shapes(output, targets)
            parts.append(self._each(output.float().clamp(0.0, 1.0), targets))
        each = torch.cat(parts).double().numpy()
        return Score(float(each.mean()) if len(each) else math.nan, len(each), each=each)

    def _each(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.name == "psnr":
            error = (images - targets).square().flatten(1).mean(dim=1)
            found = theirs.peak_signal_noise_ratio(images, targets, data_range=1.0, reduction="none", dim=(1, 2, 3))
            return torch.where(error > 0, found, torch.full_like(found, _MOST_DB)).clamp_max(_MOST_DB)
        check_ssim(targets.shape[2:])
        similar = theirs.structural_similarity_index_measure(images, targets, data_range=1.0, reduction="none")
        assert isinstance(similar, Tensor)
        return similar

    def drop(self, before: float, after: float) -> float:
        """Of ``psnr`` the share of the dB that is lost, of ``ssim`` the difference."""
        return (before - after) / max(before, 1.0) if self.name == "psnr" else before - after


def check_ssim(size: Sequence[int]) -> None:
    """Refuses images, (height, width), that the window of the structural similarity does not fit into.

    Raises:
        DataError: says so.
    """
    if min(size) < _SSIM_WINDOW:
        raise DataError(f"images of {list(size)} pixels are too small for ssim: use psnr")


def _check_shapes(output: Tensor, targets: Tensor) -> None:
    if output.shape != targets.shape:
        raise DataError(
            f"the model returns {list(output.shape)}, and the images to be given back are {list(targets.shape)}: "
            "both need one shape"
        )
