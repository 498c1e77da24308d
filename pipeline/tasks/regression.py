"""The task of predicting numbers: forecasts, restoration, autoencoders, sensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.answers.values import VALUES
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import Answer, Metric, Score
from ..task import Split, SplitName
from .array_task import Array, ArrayTask, Augmentation, dealt

_OUTPUT = "values"


class Regression(ArrayTask):
    """Numbers for each row, [N] or [N, ...]; trained by the mean squared error.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays, targets float32 in the unit of the data.
        columns: names of the numbers of a row (axis 1), if there are any.
        unit: of the numbers, for people.
        standardise: the model predicts ``(target - mean) / deviation`` of each column of the train split; metric,
            `predict` and targets stay in the unit of the data. False: it predicts the unit of the data itself.
        metric: ``mse``, ``mae`` (a drop is relative growth), ``r2`` (a drop is the difference), or your own.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split or metric, or targets that are no float32.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        *,
        columns: Sequence[str] = (),
        unit: str = "",
        standardise: bool = False,
        metric: str | Metric = "mse",
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "regression",
        input_name: str | Sequence[str] = "x",
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
        for key, split in self._splits.items():
            if not split.targets.is_floating_point():
                raise DataError(f"split {key!r} has targets in {split.targets.dtype}: give numbers in float32")
        self._columns, self._unit = tuple(str(column) for column in columns), unit
        self._scale, self._offset = torch.ones(()), torch.zeros(())
        if standardise:
            if "train" not in self._splits:
                raise DataError("standardise needs the split 'train', whose mean and deviation it takes")
            self._scale, self._offset = _spread(self._splits["train"].targets)
        self._standardised = standardise
        self._metric = _metric(metric, self._scale, self._offset) if isinstance(metric, str) else metric

    @classmethod
    def from_arrays(
        cls,
        inputs: Array | Sequence[Array],
        targets: Array,
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Regression:
        """Splits arrays into the four splits, equal inputs kept together.

        Args:
            inputs: [len, ...]; a list or tuple of them for a model with several inputs, with as many names in
                `input_name`.
            targets: float [len] or [len, ...], in the unit of the data.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class.
        """
        return cls(dealt(inputs, torch.as_tensor(targets).to(torch.float32), fractions, seed), **options)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: values in the unit of the data."""
        if not self._standardised:
            return (AnswerSpec(_OUTPUT, VALUES, self._columns, self._unit),)
        scale, offset = (tuple(x.reshape(-1).tolist()) for x in (self._scale, self._offset))
        return (AnswerSpec(_OUTPUT, VALUES, self._columns, self._unit, scale, offset),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, of the standardised values where they are.

        Raises:
            DataError: the output has another shape than the targets.
        """
        scale, offset = _for(self._scale, targets), _for(self._offset, targets)
        return nn.functional.mse_loss(_alike(output, targets), (targets - offset) / scale)

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric


class ErrorOfValues:
    """Mean squared or absolute error, or the coefficient of determination, in the unit of the data.

    Args:
        name: ``mse``, ``mae`` or ``r2``.
        scale: what the output is multiplied by to be in that unit, [columns] or a scalar.
        offset: what is added then.
    """

    def __init__(self, name: Literal["mse", "mae", "r2"], scale: Tensor, offset: Tensor) -> None:
        self.name: str = name
        self._scale, self._offset = scale, offset

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; sums in float64."""
        parts = [torch.zeros(0, 5, dtype=torch.float64)]
        for output, targets in answers:
            assert isinstance(output, Tensor)
            wanted = targets.double()
            values = _alike(output, targets).double() * _for(self._scale, targets) + _for(self._offset, targets)
            off = (values - wanted).reshape(len(targets), -1)
            wanted = wanted.reshape(len(targets), -1)
            count = torch.full((len(targets),), off.shape[1], dtype=torch.float64)
            sums = (off.square().sum(dim=1), off.abs().sum(dim=1), wanted.sum(dim=1), wanted.square().sum(dim=1), count)
            parts.append(torch.stack(sums, dim=1))
        each = torch.cat(parts).numpy()
        return Score(self.value_of(each), len(each), each=each)

    def value_of(self, each: NDArray[Any]) -> float:
        """Of some rows.

        Args:
            each: [rows, 5] sums over a row's values: squared and absolute errors, what is right, its squares, 1.
        """
        error, absolute, total, squares, count = (float(x) for x in each.sum(axis=0))
        if self.name == "mae":
            return absolute / max(1.0, count)
        if self.name == "mse":
            return error / max(1.0, count)
        spread = squares - total * total / max(1.0, count)
        return 1.0 - error / spread if spread > 0.0 else (1.0 if error == 0.0 else -math.inf)

    def drop(self, before: float, after: float) -> float:
        """Of errors the relative growth, of ``r2`` the difference."""
        if self.name == "r2":
            return before - after
        if before > 0.0:
            return after / before - 1.0
        return 0.0 if after <= before else math.inf


def _metric(name: str, scale: Tensor, offset: Tensor) -> Metric:
    for known in ("mse", "mae", "r2"):
        if name == known:
            return ErrorOfValues(known, scale, offset)
    raise DataError(f"unknown metric {name!r}; there are mse, mae and r2, or pass an object that is a Metric")


def _spread(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of every column (axis 1), 1 where a column does not vary; of [N] of all."""
    columns = targets.double().reshape(len(targets), -1) if targets.dim() < 2 else targets.double().transpose(0, 1)
    columns = columns.reshape(1 if targets.dim() < 2 else targets.shape[1], -1)
    deviation = columns.std(dim=1, correction=0)
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation)).float(), columns.mean(dim=1).float()


def _for(numbers: Tensor, targets: Tensor) -> Tensor:
    """`numbers` of the columns, shaped so that they meet axis 1 of `targets`."""
    numbers = numbers.to(targets.device)
    return numbers.reshape(1, -1, *(1,) * (targets.dim() - 2)) if numbers.dim() and targets.dim() > 1 else numbers


def _alike(output: Tensor, targets: Tensor) -> Tensor:
    """`output` in the shape of `targets`, which differ by axes of one at most: [N, 1] and [N]."""
    ours, theirs = ([size for size in x.shape[1:] if size != 1] for x in (output, targets))
    if len(output) != len(targets) or ours != theirs:
        raise DataError(
            f"the model returns {list(output.shape)} and the targets are {list(targets.shape)}: both need one shape"
        )
    return output.reshape(targets.shape)
