"""A task of which only some classes are left: what a network that is specialised to them is trained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ..errors import DataError
from ..metric import ClassScore, Metric
from ..task import Batch, Split, SplitName, Task


def class_indices(labels: Sequence[str], wanted: Sequence[str | int], asked_by: str) -> tuple[int, ...]:
    """The indices of the classes that `wanted` names, in the order of `labels`.

    Args:
        labels: of the task.
        wanted: names, or indices from 0.
        asked_by: for the error.

    Raises:
        DataError: an unknown class, one that is named twice, or fewer than two.
    """
    found: list[int] = []
    for one in wanted:
        index = one if isinstance(one, int) else labels.index(one) if one in labels else -1
        if not 0 <= index < len(labels):
            raise DataError(
                f"{asked_by}: there is no class {one!r}; the task has {len(labels)}: {', '.join(labels[:20])}"
                + (", ..." if len(labels) > 20 else "")
            )
        if index in found:
            raise DataError(f"{asked_by}: class {labels[index]!r} is named twice; name every class once")
        found.append(index)
    if len(found) < 2:
        raise DataError(
            f"{asked_by}: a classifier needs two classes at least, and {list(wanted)!r} is one: add another"
        )
    return tuple(sorted(found))


def restricted(task: Task, wanted: Sequence[str | int], asked_by: str) -> Task:
    """`task` with the classes that `wanted` names; the task itself if it names none or all.

    Raises:
        DataError: see `class_indices` and `ClassSubset`.
    """
    classes = class_indices(task.labels, wanted, asked_by) if wanted else ()
    return ClassSubset(task, classes) if 0 < len(classes) < len(task.labels) else task


class ClassSubset:
    """`task` with the samples of some classes only, which are numbered anew from 0; a `Task`."""

    def __init__(self, task: Task, classes: Sequence[int]) -> None:
        """Restricts `task`.

        Args:
            task: any task with classes.
            classes: indices that stay, ascending; see `class_indices`.

        Raises:
            DataError: a split has no sample of them.
        """
        self._task, self._classes = task, tuple(classes)
        number = torch.full((len(task.labels),), -1, dtype=torch.int64)
        number[list(self._classes)] = torch.arange(len(self._classes))
        self._splits: dict[SplitName, Split] = {name: _SubsetSplit(s, number) for name, s in task.splits.items()}
        for name, split in self._splits.items():
            if len(split) == 0:
                raise DataError(
                    f"split {name!r} of the task {task.name!r} has no sample of the classes {', '.join(self.labels)}: "
                    "add some, or choose other classes"
                )

    @property
    def name(self) -> str:
        """That of the task."""
        return self._task.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes that are left."""
        return tuple(self._task.labels[i] for i in self._classes)

    @property
    def input_names(self) -> tuple[str, ...]:
        """As before."""
        return self._task.input_names

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """As before."""
        return self._task.dynamic_axes

    @property
    def preprocessing(self) -> Preprocessing:
        """As before."""
        return self._task.preprocessing

    @property
    def provenance(self) -> Mapping[str, Any]:
        """That of the task, and which of its classes are left."""
        return {**self._task.provenance, "classes": list(self.labels)}

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist, with the samples that are left."""
        return self._splits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The task's, on fewer classes."""
        return self._task.loss(logits, targets)

    @property
    def metric(self) -> Metric:
        """The task's; one that counts per class counts those that are left."""
        metric = self._task.metric
        return type(metric)(len(self._classes)) if isinstance(metric, ClassScore) else metric

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The task's."""
        return self._task.augment(batch, generator)


class _SubsetSplit:
    """The samples of a split whose class has a number."""

    def __init__(self, split: Split, number: Tensor) -> None:
        self._split, self._number = split, number
        self._rows = (number[split.targets] >= 0).nonzero().flatten()

    @property
    def targets(self) -> Tensor:
        """New class of every sample, int64 [len]."""
        return self._number[self._split.targets[self._rows]]

    @cached_property
    def sample_digests(self) -> Sequence[bytes]:
        """Those of the samples that are left."""
        whole = self._split.sample_digests
        return [whole[row] for row in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        found = self._split.batch(self._rows[torch.as_tensor(indices)])
        return Batch(found.inputs, self._number[found.targets])
