"""The task of telling which classes a row shows: any number of them, or none."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.answers.multilabel import MULTILABEL
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import Answer, Metric, Score
from ..task import Split, SplitName
from .array_task import Array, ArrayTask, Augmentation, dealt
from .changed_split import ChangedSplit

_OUTPUT = "classes_present"
_METRICS = ("mean_average_precision", "f1")


class MultiLabel(ArrayTask):
    """A logit for each class [N, C], targets float32 [N, C], 1 where a row shows the class and 0 where not.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays.
        classes: names of the classes, in the order of the logits.
        metric: ``mean_average_precision`` (of the classes that occur), ``f1`` (at `thresholds`), or your own.
        thresholds: probability from which `predict` and ``f1`` count a class, one number or one for each class.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split or metric, no class, a class twice, or targets other than 0 and 1.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        classes: Sequence[str],
        *,
        metric: str | Metric = "mean_average_precision",
        thresholds: float | Sequence[float] = (),
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "multilabel",
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
        if not self._classes or len(set(self._classes)) < len(self._classes):
            raise DataError(f"the classes are {list(self._classes)}: give at least one, each once")
        self._thresholds = (
            (float(thresholds),) if isinstance(thresholds, int | float) else tuple(map(float, thresholds))
        )
        if len(self._thresholds) not in (0, 1, len(self._classes)) or any(not 0 < t < 1 for t in self._thresholds):
            raise DataError(
                f"thresholds are {list(self._thresholds)}: give one probability between 0 and 1, or one for each of "
                f"the {len(self._classes)} classes"
            )
        for key, split in self._splits.items():
            _check_targets(key, split.targets, len(self._classes))
        self._metric = PresenceMetric(metric, self._classes, self._thresholds) if isinstance(metric, str) else metric

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
    ) -> MultiLabel:
        """Splits arrays into the four splits, equal inputs kept together.

        Args:
            inputs: [len, ...]; a list or tuple of them for a model with several inputs, with as many names in
                `input_name`.
            targets: [len, C], 0 and 1, or bool.
            classes: names of the classes.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class.
        """
        return cls(dealt(inputs, torch.as_tensor(targets).to(torch.float32), fractions, seed), classes, **options)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: the classes that are there."""
        return (AnswerSpec(_OUTPUT, MULTILABEL, self._classes, thresholds=self._thresholds),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean binary cross entropy over rows and classes."""
        return nn.functional.binary_cross_entropy_with_logits(output, targets)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the columns."""
        return self._classes

    def classes_present(self, targets: Tensor) -> Tensor:
        """Bool [N, C]: the targets."""
        return targets > 0

    def of_classes(self, classes: Sequence[int]) -> MultiLabel:
        """The task with these columns only; every row stays, and may show none of them."""
        columns = torch.tensor(list(classes))
        made = copy.copy(self)
        made._classes = tuple(self._classes[index] for index in classes)
        if len(self._thresholds) > 1:
            made._thresholds = tuple(self._thresholds[index] for index in classes)
        made._splits = {
            key: ChangedSplit(split, lambda targets: targets[:, columns]) for key, split in self._splits.items()
        }
        made._provenance = {**self._provenance, "classes": list(made._classes)}
        if isinstance(self._metric, PresenceMetric):
            made._metric = PresenceMetric(self._metric.name, made._classes, made._thresholds)
        return made

    def class_loss(self, output: Tensor, targets: Tensor, index: int) -> Tensor:
        """The binary cross entropy of one class, over the number of classes: these parts add up to the loss."""
        part = nn.functional.binary_cross_entropy_with_logits(output[:, index], targets[:, index])
        return part / len(self._classes)

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric


class PresenceMetric:
    """Quality of several labels, by `torchmetrics`: the mean over the classes that occur.

    Args:
        name: ``mean_average_precision`` or ``f1``.
        classes: their names.
        thresholds: of ``f1``; none: 0.5.

    Raises:
        DataError: an unknown name.
    """

    def __init__(self, name: str, classes: Sequence[str], thresholds: Sequence[float]) -> None:
        if name not in _METRICS:
            raise DataError(
                f"unknown metric {name!r}; there are {' and '.join(_METRICS)}, or pass an object that is a Metric"
            )
        self.name, self._classes = name, len(classes)
        self._thresholds = torch.tensor(thresholds or (0.5,), dtype=torch.float32)

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; keeps a probability for each row and class."""
        parts = [torch.zeros(0, 2 * self._classes)]
        for output, targets in answers:
            assert isinstance(output, Tensor)
            parts.append(torch.cat([output.float().sigmoid(), (targets > 0).float()], dim=1))
        each = torch.cat(parts).numpy()
        value = self.value_of(each)
        return Score(0.0 if math.isnan(value) else value, len(each), each=each)

    def value_of(self, each: NDArray[Any]) -> float:
        """Of some rows.

        Args:
            each: float32 [rows, 2 * classes], probabilities and then 1 for what is there.
        """
        probability, wanted = torch.split(torch.from_numpy(each), self._classes, dim=1)
        there = wanted.any(dim=0)
        if not there.any():
            return math.nan
        found, right = probability[:, there], wanted[:, there].to(torch.int64)
        if self.name == "f1":
            return float(_f1(found >= self._thresholds.expand(self._classes)[there], right).mean())
        return float(_average_precision(found, right).mean())

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


def _average_precision(probability: Tensor, right: Tensor) -> Tensor:
    """[C] of classes that occur."""
    from torchmetrics.functional.classification import binary_average_precision, multilabel_average_precision

    classes = right.shape[1]
    if classes == 1:
        return binary_average_precision(probability[:, 0], right[:, 0]).reshape(1)
    found: Tensor = multilabel_average_precision(probability, right, classes, average="none", validate_args=False)
    return found


def _f1(said: Tensor, right: Tensor) -> Tensor:
    """[C] of classes that occur."""
    from torchmetrics.functional.classification import binary_f1_score, multilabel_f1_score

    classes = right.shape[1]
    if classes == 1:
        return binary_f1_score(said[:, 0].to(torch.int64), right[:, 0]).reshape(1)
    found: Tensor = multilabel_f1_score(said.to(torch.int64), right, classes, average="none", validate_args=False)
    return found


def _check_targets(split: SplitName, targets: Tensor, classes: int) -> None:
    if targets.dim() != 2 or targets.shape[1] != classes or targets.dtype != torch.float32:
        raise DataError(
            f"split {split!r} has targets {targets.dtype} {list(targets.shape)}: which of the {classes} classes a row "
            "shows is float32 [rows, classes], 1 or 0"
        )
    wrong = targets[(targets != 0) & (targets != 1)]
    if len(wrong):
        raise DataError(f"split {split!r} has the target {float(wrong[0]):g}: a row shows a class (1) or not (0)")
