"""The task of giving every pixel a class."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.answers.class_map import CLASS_MAP
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import IGNORED, Answer, Metric, Score
from ..task import Split, SplitName, split_presence
from .array_task import Array, ArrayTask, Augmentation, dealt
from .changed_split import ChangedSplit

_OUTPUT = "class_map"
BACKGROUND = ("background", "__background__")
"""Names of a class 0 that is whatever the others are not."""


@runtime_checkable
class ChecksTargets(Protocol):
    """A split that does not hold its maps, and looks through them itself, one after the other."""

    def check_targets(self, classes: int) -> None:
        """Refuses a map that is none of so many classes.

        Raises:
            DataError: names the file.
        """
        ...


class Segmentation(ArrayTask):
    """A class for each pixel: logits [N, C, H, W], targets int64 [N, H, W], -100 where nothing is predicted.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays.
        classes: names of the classes, in the order of the logits.
        metric: ``mean_iou`` (mean intersection over union of the classes that occur), ``pixel_accuracy``, or your own.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only; moves inputs and targets alike.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split or metric, fewer than two classes, or a target that is none of them.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        classes: Sequence[str],
        *,
        metric: str | Metric = "mean_iou",
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "segmentation",
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
        self._classes = tuple(str(label) for label in classes)
        if len(self._classes) < 2:
            raise DataError(f"the classes are {list(self._classes)}: pixels need at least two to choose from")
        for key, split in self._splits.items():
            if isinstance(split, ChecksTargets):
                split.check_targets(len(self._classes))
            else:
                _check_targets(key, split.targets, len(self._classes))
        self._metric = _metric(metric, len(self._classes)) if isinstance(metric, str) else metric

    @classmethod
    def from_arrays(
        cls,
        inputs: Array | Sequence[Array],
        targets: Array,
        classes: Sequence[str],
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Segmentation:
        """Splits arrays into the four splits, equal inputs kept together.

        Args:
            inputs: [len, ...]; a list or tuple of them for a model with several inputs, with as many names in
                `input_name`.
            targets: class of every pixel, integers [len, H, W]; -100 where nothing is predicted.
            classes: names of the classes.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class.
        """
        given = torch.as_tensor(targets)
        if given.is_floating_point():
            raise DataError(f"the targets are {given.dtype}: classes of pixels are integers [len, H, W]")
        return cls(dealt(inputs, given.to(torch.int64), fractions, seed), classes, **options)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: a class map."""
        return (AnswerSpec(_OUTPUT, CLASS_MAP, self._classes),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of the pixels that have a class."""
        return nn.functional.cross_entropy(output, targets, ignore_index=IGNORED)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the pixels."""
        return self._classes

    def classes_present(self, targets: Tensor) -> Tensor:
        """Bool [N, C]: the classes of which a map has a pixel."""
        known = torch.where(targets == IGNORED, len(self._classes), targets).flatten(1)
        found = torch.zeros(len(targets), len(self._classes) + 1, dtype=torch.bool, device=targets.device)
        return found.scatter_(1, known, True)[:, :-1]

    def class_loss(self, output: Tensor, targets: Tensor, index: int) -> Tensor:
        """The cross entropy of the pixels of class `index`, as a share of all pixels of their map that have a class."""
        each = nn.functional.cross_entropy(output, targets, ignore_index=IGNORED, reduction="none").flatten(1)
        known = (targets != IGNORED).flatten(1).sum(dim=1).clamp(min=1)
        return ((each * (targets == index).flatten(1)).sum(dim=1) / known).mean()

    def of_classes(self, classes: Sequence[int]) -> Segmentation:
        """The task with these classes only.

        Pixels of the others become background where class 0 is one (`BACKGROUND`) and stays: on the device they are
        still in the pictures, and every pixel gets an answer. Without a background nothing right can be said of them:
        they are ignored, and maps without any other pixel leave.

        Raises:
            DataError: one class is left, or a split without samples.
        """
        names = tuple(self._classes[index] for index in classes)
        if len(names) < 2:
            raise DataError(
                f"of the task {self.name!r} the class {names[0]!r} alone would be left: pixels need two to choose from"
                + (f", name {self._classes[0]!r} too" if self._classes[0] in BACKGROUND else "")
            )
        others = 0 if 0 in classes and self._classes[0] in BACKGROUND else IGNORED
        number = torch.full((len(self._classes) + 1,), others, dtype=torch.int64)
        number[list(classes)] = torch.arange(len(classes))
        number[-1] = IGNORED

        def renumbered(targets: Tensor) -> Tensor:
            # the last place is that of the pixels that have been ignored before
            return number[torch.where(targets == IGNORED, len(number) - 1, targets)]

        splits: dict[SplitName, Split] = {}
        for key, split in self._splits.items():
            rows = None
            if others == IGNORED:
                rows = split_presence(self, split)[:, list(classes)].any(dim=1).nonzero().flatten()
                if len(rows) == 0:
                    raise DataError(
                        f"split {key!r} of the task {self.name!r} has no pixel of {', '.join(names)}: choose others"
                    )
            splits[key] = ChangedSplit(split, renumbered, rows)
        made = copy.copy(self)
        made._splits, made._classes = splits, names
        made._provenance = {**self._provenance, "classes": list(names)}
        if isinstance(self._metric, PixelMetric):
            made._metric = PixelMetric(self._metric.name, len(names))
        return made

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric


class PixelMetric:
    """Quality of class maps, from one table of what was right and what was said.

    Args:
        name: ``mean_iou`` or ``pixel_accuracy``.
        classes: their number.
    """

    def __init__(self, name: str, classes: int) -> None:
        self.name, self._classes = name, classes

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; pixels to be ignored count for nothing."""
        classes = self._classes
        parts = [torch.zeros(0, 3 * classes, dtype=torch.int32)]
        for output, targets in answers:
            assert isinstance(output, Tensor)
            found = torch.where(targets == IGNORED, classes, output.argmax(dim=1)).flatten(1)
            wanted = torch.where(targets == IGNORED, classes, targets).flatten(1)
            right = torch.where(found == wanted, wanted, classes)
            counts = [_counted(pixels, classes) for pixels in (right, found, wanted)]
            parts.append(torch.cat(counts, dim=1))
        each = torch.cat(parts).numpy()
        value = self.value_of(each)
        return Score(0.0 if math.isnan(value) else value, len(each), each=each)

    def value_of(self, each: NDArray[Any]) -> float:
        """Of some maps.

        Args:
            each: int32 [maps, 3 * classes], pixels of a class that are right, that were said to be of it, that are.
        """
        hits, found, wanted = each.sum(axis=0, dtype=np.float64).reshape(3, self._classes)
        if self.name == "pixel_accuracy":
            return float(hits.sum() / max(wanted.sum(), 1.0))
        union = found + wanted - hits
        occurs = union > 0
        return float((hits[occurs] / union[occurs]).mean()) if occurs.any() else math.nan

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


def _counted(pixels: Tensor, classes: int) -> Tensor:
    """Pixels of each class in every map, int32 [N, classes]; those of the number `classes` are left out."""
    counts = torch.zeros(len(pixels), classes + 1, dtype=torch.int32, device=pixels.device)
    return counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.int32))[:, :classes]


def _metric(name: str, classes: int) -> Metric:
    if name not in ("mean_iou", "pixel_accuracy"):
        raise DataError(
            f"unknown metric {name!r}; there are mean_iou and pixel_accuracy, or pass an object that is a Metric"
        )
    return PixelMetric(name, classes)


def _check_targets(split: SplitName, targets: Tensor, classes: int) -> None:
    if targets.dtype != torch.int64 or targets.dim() != 3:
        raise DataError(
            f"split {split!r} has targets {targets.dtype} {list(targets.shape)}: a class for each pixel is int64 "
            "[samples, H, W]; turn one-hot maps into classes with .argmax(axis=1)"
        )
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise DataError(
            f"split {split!r} has a pixel of class {int(wrong[0])}, and the {classes} classes are numbered from 0 to "
            f"{classes - 1}: add the class, or mark such pixels with {IGNORED}, which are ignored"
        )
