"""The task that most recipes have: images (or any one input) in classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ..errors import DataError
from ..metric import Metric, metric_named
from ..task import SPLITS, Batch, Split, SplitName
from .splits import TensorSplit, as_split, class_indices
from .splitting import stratified_split

Augmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


class ImageClassification:
    """A classification task; its inputs are one tensor of images by default, any number of tensors [N, ...] works.

    Args:
        splits: per name a `Split`, a pair ``(inputs, targets)`` of arrays, or a map-style dataset of pairs. Several
            inputs need a `Split`, e.g. `TensorSplit`; `from_arrays` makes them.
        labels: class names.
        preprocessing: how raw images become inputs on the device.
        augment: ``(inputs [N, ...], generator) -> inputs``, for training batches only.
        metric: what floors and tolerances are measured in: the name of one that ships, or your own.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from (files and their sha256, fonts), JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`; a run stops when one is edited.

    Raises:
        DataError: a target outside the labels, an unknown split name or an unknown metric.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any] | Dataset[Any]],
        labels: Sequence[str],
        *,
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        metric: str | Metric = "accuracy",
        name: str = "image_classification",
        input_name: str | Sequence[str] = "image",
        provenance: Mapping[str, Any] | None = None,
        file_digests: Mapping[Path, str] | None = None,
    ) -> None:
        self._splits: dict[SplitName, Split] = {}
        for key, value in splits.items():
            if key not in SPLITS:
                raise DataError(f"unknown split {key!r}; there are {', '.join(SPLITS)}")
            self._splits[key] = as_split(value)
        self._labels = tuple(str(label) for label in labels)
        self._preprocessing = preprocessing or Preprocessing()
        self._augment = augment
        self._metric = metric_named(metric, len(self._labels)) if isinstance(metric, str) else metric
        self._name = name
        self._input_names = (input_name,) if isinstance(input_name, str) else tuple(input_name)
        self._provenance = dict(provenance or {})
        self._file_digests = dict(file_digests or {})
        for key, split in self._splits.items():
            if len(split) == 0:
                raise DataError(f"split {key!r} is empty: leave it out or add samples")
            if len(split) and int(split.targets.max()) >= len(self._labels):
                row = int(split.targets.argmax())
                raise DataError(
                    f"sample {row} of split {key!r} has class {int(split.targets[row])}, "
                    f"and there are {len(self._labels)} labels, for classes 0 to {len(self._labels) - 1}: number the "
                    "classes without gaps, or give all labels"
                )

    @classmethod
    def from_arrays(
        cls,
        inputs: Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any]],
        targets: Tensor | NDArray[Any],
        labels: Sequence[str],
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ImageClassification:
        """Splits arrays into the four splits, class by class; see `stratified_split`.

        Args:
            inputs: [len, ...]; a list or tuple of them for a model with several inputs, with as many names in
                `input_name`.
            targets: class indices [len].
            labels: class names.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.
        """
        several = inputs if isinstance(inputs, list | tuple) else [inputs]
        xs, y = [torch.as_tensor(x) for x in several], class_indices(targets)
        chosen = stratified_split(TensorSplit(xs, y).sample_digests, y, labels, fractions, seed)
        parts: dict[SplitName, Any] = {}
        for name, indices in chosen.items():
            order = torch.tensor(sorted(indices), dtype=torch.int64)
            parts[name] = TensorSplit([x[order] for x in xs], y[order])
        return cls(parts, labels, **options)

    @property
    def name(self) -> str:
        """A short name for reports."""
        return self._name

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        return self._labels

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order of the model's forward."""
        return self._input_names

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """The batch may vary, in every input."""
        return tuple({0: "batch"} for _ in self._input_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        return self._preprocessing

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the data come from."""
        return self._provenance

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """Files that the data were read from."""
        return self._file_digests

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        return self._splits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(logits, targets)

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Applies the augmentation that was given, if any."""
        if self._augment is None:
            return batch
        return Batch((self._augment(batch.inputs[0], generator), *batch.inputs[1:]), batch.targets)
