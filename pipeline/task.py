"""Data, loss and metric: the contract of a task, and the image classification that ships.

A task has up to four splits that never share a sample: `train` (fit), `calibration` (statistics),
`validation` (thresholds, ranks, floors), `test` (claims). A model is called positionally with a batch's
inputs and returns one tensor of logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from edgewright.edge_runtime.manifest import Preprocessing

from .errors import DataError
from .splitting import stratified_split

SplitName: TypeAlias = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """Some samples: `inputs` in the order the model takes them, first axis N, and int64 `targets` [N]."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(tuple(x.to(device) for x in self.inputs), self.targets.to(device))


class Split(Protocol):
    """One part of a data set; random access, so that epochs can be shuffled and classes picked."""

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
        ...

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's content; equal content has equal hashes."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`.

        Raises:
            DataError: a sample cannot be read or is not finite; names it.
        """
        ...


class Task(Protocol):
    """What the pipeline, the export and the report ask of a task.

    `ImageClassification` is one; write your own freely.
    """

    @property
    def name(self) -> str:
        """A short name for reports."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; their number is the number of logits."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order; they become the ONNX input names."""
        ...

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """Per input: axis -> name, for the axes that may vary. Axis 0 is ``"batch"``."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        ...

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean training loss, scalar."""
        ...

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A random variation of a training batch; the identity where there is none."""
        ...


@dataclass(frozen=True)
class Score:
    """Quality on one split.

    Attributes:
        accuracy: share of rows that are right.
        worst_class_accuracy: the lowest accuracy of a class that has samples.
        per_class: accuracy of every class, None where the split has no sample of it.
        rows: number of samples.
    """

    accuracy: float
    worst_class_accuracy: float
    per_class: tuple[float | None, ...]
    rows: int


def batches(
    split: Split, size: int, generator: torch.Generator | None = None, drop_last: bool = False
) -> Iterator[Batch]:
    """The samples of `split` in batches of `size`; shuffled if a generator is given."""
    count = len(split)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for start in range(0, count, size):
        chosen = order[start : start + size]
        if drop_last and start > 0 and len(chosen) < size:
            return
        yield split.batch(chosen)


def score(predicted: Tensor, targets: Tensor, classes: int) -> Score:
    """Accuracy overall and per class.

    Args:
        predicted: int64 [N], class indices.
        targets: int64 [N].
        classes: number of classes.
    """
    right = (predicted == targets).to(torch.float64)
    hits = torch.zeros(classes, dtype=torch.float64).index_add_(0, targets, right)
    counts = torch.bincount(targets, minlength=classes)
    per_class = tuple(float(h / c) if c else None for h, c in zip(hits.tolist(), counts.tolist(), strict=True))
    present = [p for p in per_class if p is not None]
    return Score(float(right.mean()) if len(right) else 0.0, min(present, default=0.0), per_class, len(right))


@torch.no_grad()
def predictions(model: nn.Module, split: Split, device: torch.device | None = None, size: int = 256) -> Tensor:
    """Class indices int64 [len(split)] that `model` answers in eval mode, exits included."""
    device = torch.device("cpu") if device is None else device
    model = model.to(device).eval()
    found = []
    for batch in batches(split, size):
        output = model(*batch.to(device).inputs)
        found.append((output.label if hasattr(output, "exit_index") else output.argmax(dim=1)).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def evaluate(model: nn.Module, task: Task, split: SplitName, device: torch.device | None = None) -> Score:
    """Quality of `model` on a split of `task`."""
    data = split_of(task, split, needed_by="evaluation")
    return score(predictions(model, data, device), data.targets, len(task.labels))


def split_of(task: Task, name: SplitName, needed_by: str) -> Split:
    """The split called `name`.

    Raises:
        DataError: the task has none.
    """
    if name not in task.splits:
        raise DataError(f"the task {task.name!r} has no {name!r} split, which {needed_by} needs: add it to the task")
    return task.splits[name]


def check_classes(task: Task, name: SplitName, needed_by: str) -> None:
    """Refuses a split in which a class has no sample.

    Raises:
        DataError: names the class.
    """
    split = split_of(task, name, needed_by)
    counts = torch.bincount(split.targets, minlength=len(task.labels))
    empty = [task.labels[i] for i in range(len(task.labels)) if counts[i] == 0]
    if empty:
        raise DataError(
            f"class {empty[0]!r} has no sample in the {name!r} split ({len(empty)} such classes), which "
            f"{needed_by} needs: add samples of it, or remove it from the labels"
        )


def data_digests(task: Task) -> dict[str, str]:
    """sha256 of every split's content, in order of its samples, and of the task's `provenance` if it has one.

    Raises:
        DataError: two splits share a sample, so that a choice could be judged on the data it was made on.
    """
    digests: dict[str, str] = {}
    owner: dict[bytes, tuple[str, int]] = {}
    for name in SPLITS:
        if name not in task.splits:
            continue
        split = task.splits[name]
        whole = hashlib.sha256()
        for row, digest in enumerate(split.sample_digests):
            whole.update(digest)
            other, other_row = owner.setdefault(digest, (name, row))
            if other != name:
                raise DataError(
                    f"sample {row} of split {name!r} is also sample {other_row} of {other!r}: "
                    "splits must not overlap, remove it from one of them"
                )
        whole.update(split.targets.numpy().tobytes())
        digests[name] = whole.hexdigest()
    if provenance := provenance_of(task):
        text = json.dumps(provenance, sort_keys=True, ensure_ascii=True)
        digests["provenance"] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def provenance_of(task: Task) -> Mapping[str, Any]:
    """Where the task's data come from, JSON; empty for tasks that do not say."""
    return getattr(task, "provenance", {})


class TensorSplit:
    """A split that lies in memory."""

    def __init__(self, inputs: Sequence[Tensor | NDArray[Any]], targets: Tensor | NDArray[Any] | Sequence[int]) -> None:
        """Checks and keeps the data.

        Args:
            inputs: per model input, float32 or integer [len, ...].
            targets: class indices [len].

        Raises:
            DataError: lengths differ, targets are no class indices, or a value is NaN or infinite.
        """
        self._inputs = tuple(torch.as_tensor(x) for x in inputs)
        self._targets = torch.as_tensor(targets).to(torch.int64).reshape(-1)
        for i, x in enumerate(self._inputs):
            if len(x) != len(self._targets):
                raise DataError(f"input {i} has {len(x)} samples and there are {len(self._targets)} targets")
            if x.dtype == torch.float64:
                raise DataError(
                    f"input {i} is float64; models run in float32: convert it, e.g. with .astype('float32')"
                )
            if x.is_floating_point():
                bad = ~torch.isfinite(x.reshape(len(x), -1)).all(dim=1) if len(x) else torch.zeros(0, dtype=torch.bool)
                if bad.any():
                    row = int(bad.nonzero()[0])
                    raise DataError(f"sample {row} of input {i} holds NaN or infinity ({int(bad.sum())} such samples)")
        if len(self._targets) and int(self._targets.min()) < 0:
            raise DataError(f"sample {int(self._targets.argmin())} has the negative class {int(self._targets.min())}")

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's inputs."""
        arrays = [np.ascontiguousarray(x.numpy()) for x in self._inputs]
        return [
            hashlib.blake2b(b"".join(a[i].tobytes() for a in arrays), digest_size=16).digest() for i in range(len(self))
        ]

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        chosen = torch.as_tensor(indices)
        return Batch(tuple(x[chosen] for x in self._inputs), self._targets[chosen])


class DatasetSplit:
    """A split read sample by sample from a map-style dataset of ``(input, ..., class)``."""

    def __init__(self, dataset: Dataset[Any], targets: Sequence[int] | None = None) -> None:
        """Wraps `dataset`.

        Args:
            dataset: any object with ``__len__`` and ``__getitem__``.
            targets: its classes, if known without reading every sample.
        """
        self._dataset: Any = dataset
        self._digests: list[bytes] | None = None
        self._targets = None if targets is None else torch.as_tensor(targets, dtype=torch.int64)

    def _read(self, index: int) -> tuple[tuple[Tensor, ...], int]:
        try:
            *inputs, target = self._dataset[index]
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"sample {index} cannot be read: {error}; repair or remove it") from error
        tensors = tuple(torch.as_tensor(x) for x in inputs)
        for x in tensors:
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise DataError(f"sample {index} holds NaN or infinity; repair or remove it")
        return tensors, int(target)

    def _scan(self) -> None:
        digests, targets = [], []
        for i in range(len(self)):
            inputs, target = self._read(i)
            content = b"".join(np.ascontiguousarray(x.numpy()).tobytes() for x in inputs)
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
            targets.append(target)
        self._digests, self._targets = digests, torch.tensor(targets, dtype=torch.int64)

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
        if self._targets is None:
            self._scan()
        assert self._targets is not None
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's inputs; reads the whole split once."""
        if self._digests is None:
            self._scan()
        assert self._digests is not None
        return self._digests

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        rows = [self._read(int(i)) for i in torch.as_tensor(indices).tolist()]
        if not rows:
            raise DataError("a batch needs at least one sample")
        inputs = tuple(torch.stack(column) for column in zip(*(r[0] for r in rows), strict=True))
        return Batch(inputs, torch.tensor([r[1] for r in rows], dtype=torch.int64))


Augmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


class ImageClassification:
    """A classification task over one input tensor; images by default, any [N, ...] works.

    Args:
        splits: per name a `Split`, a pair ``(inputs, targets)`` of arrays, or a map-style dataset of pairs.
        labels: class names.
        preprocessing: how raw images become inputs on the device.
        augment: ``(inputs [N, ...], generator) -> inputs``, for training batches only.
        name: for reports.
        input_name: name of the ONNX input.
        provenance: where the data come from (files and their sha256, fonts), JSON; for the report and the data digests.

    Raises:
        DataError: a target outside the labels, or an unknown split name.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any] | Dataset[Any]],
        labels: Sequence[str],
        *,
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "image_classification",
        input_name: str = "image",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self._splits: dict[SplitName, Split] = {}
        for key, value in splits.items():
            if key not in SPLITS:
                raise DataError(f"unknown split {key!r}; there are {', '.join(SPLITS)}")
            self._splits[key] = _as_split(value)
        self._labels = tuple(str(label) for label in labels)
        self._preprocessing = preprocessing or Preprocessing()
        self._augment = augment
        self._name, self._input_name = name, input_name
        self._provenance = dict(provenance or {})
        for key, split in self._splits.items():
            if len(split) == 0:
                raise DataError(f"split {key!r} is empty: leave it out or add samples")
            if len(split) and int(split.targets.max()) >= len(self._labels):
                row = int(split.targets.argmax())
                raise DataError(
                    f"sample {row} of split {key!r} has class {int(split.targets[row])}, "
                    f"and there are {len(self._labels)} labels"
                )

    @classmethod
    def from_arrays(
        cls,
        inputs: Tensor | NDArray[Any],
        targets: Tensor | NDArray[Any],
        labels: Sequence[str],
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ImageClassification:
        """Splits one array into the four splits, class by class; see `stratified_split`.

        Args:
            inputs: [len, ...].
            targets: class indices [len].
            labels: class names.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.
        """
        x, y = torch.as_tensor(inputs), torch.as_tensor(targets).to(torch.int64).reshape(-1)
        chosen = stratified_split(TensorSplit([x], y).sample_digests, y, labels, fractions, seed)
        parts: dict[SplitName, Any] = {}
        for name, indices in chosen.items():
            order = torch.tensor(sorted(indices), dtype=torch.int64)
            parts[name] = TensorSplit([x[order]], y[order])
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
        """One input."""
        return (self._input_name,)

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """The batch may vary."""
        return ({0: "batch"},)

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        return self._preprocessing

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the data come from; see `provenance_of`."""
        return self._provenance

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        return self._splits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(logits, targets)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Applies the augmentation that was given, if any."""
        if self._augment is None:
            return batch
        return Batch((self._augment(batch.inputs[0], generator), *batch.inputs[1:]), batch.targets)


def _as_split(value: Any) -> Split:
    if hasattr(value, "batch") and hasattr(value, "sample_digests"):
        split: Split = value
        return split
    if isinstance(value, tuple) and len(value) == 2:
        return TensorSplit([value[0]], value[1])
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return DatasetSplit(value, targets=getattr(value, "targets", None))
    raise DataError(f"a split is a pair (inputs, targets), a dataset or a Split, not {type(value).__name__}")
