"""A task of which only some classes are left: what a network that is specialised to them is trained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ..errors import DataError
from ..metric import ClassScore, Metric
from ..task import Batch, Split, SplitName, Task, names_of_classes
from .changed_split import ChangedSplit


@runtime_checkable
class HasClassSubsets(Protocol):
    """A task whose samples show classes, and that can be restricted to some of them."""

    def of_classes(self, classes: Sequence[int]) -> Task:
        """The same kind of task with these classes only, which are numbered anew from 0.

        Args:
            classes: indices that stay, ascending; at least one, and not all.

        Raises:
            DataError: there is nothing left to tell apart, or a split without samples.
        """
        ...


def class_indices(labels: Sequence[str], wanted: Sequence[str | int], asked_by: str, least: int = 2) -> tuple[int, ...]:
    """The indices of the classes that `wanted` names, in the order of `labels`.

    Args:
        labels: names of the task's classes.
        wanted: names, or indices from 0.
        asked_by: for the error.
        least: how many there must be.

    Raises:
        DataError: an unknown class, one that is named twice, or fewer than `least`.
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
    if len(found) < least:
        raise DataError(
            f"{asked_by}: a classifier needs two classes at least, and {list(wanted)!r} is one: add another"
        )
    return tuple(sorted(found))


def chosen_classes(task: Task, wanted: Sequence[str | int], asked_by: str) -> tuple[int, ...]:
    """The indices of the classes of `task` that `wanted` names; a row that is one of several needs two of them.

    Raises:
        DataError: see `class_indices`.
    """
    return class_indices(names_of_classes(task), wanted, asked_by, least=2 if task.labels else 1)


def restricted(task: Task, wanted: Sequence[str | int], asked_by: str) -> Task:
    """`task` with the classes that `wanted` names; the task itself if it names none or all.

    Raises:
        DataError: see `class_indices`, `ClassSubset` and `HasClassSubsets`; or a task that cannot be restricted.
    """
    names = names_of_classes(task)
    classes = chosen_classes(task, wanted, asked_by) if wanted else ()
    if not 0 < len(classes) < len(names):
        return task
    if task.labels:
        return ClassSubset(task, classes)
    if not isinstance(task, HasClassSubsets):
        raise DataError(
            f"{asked_by} keeps some of the classes of the task {task.name!r}, which does not say what becomes of "
            "samples that show the others: leave `classes` out, or give the task a method `of_classes`"
        )
    return task.of_classes(classes)


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
        self._splits: dict[SplitName, Split] = {
            name: ChangedSplit(split, number.__getitem__, (number[split.targets] >= 0).nonzero().flatten())
            for name, split in task.splits.items()
        }
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
