"""Data, loss and metric: the contract of a task.

A task has up to four splits that never share a sample: `train` (fit), `calibration` (statistics),
`validation` (thresholds, ranks, floors), `test` (claims). A model is called positionally with a batch's
inputs and returns one tensor, or a tuple or mapping of tensors of which the task's `answers` name the outputs
(`export.source.Answering`); without `answers` it is one tensor of logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.edge_runtime.errors import ExportError
from edgewright.export.graph.leaves import leaves_of
from edgewright.export.source import Source, SourceSplit

from .errors import DataError, ModelError
from .metric import Metric

SplitName: TypeAlias = Literal["train", "calibration", "validation", "test"]
_ROWS_AT_ONCE = 64
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """Some samples: `inputs` in the order the model takes them, first axis N, and int64 `targets` [N] (or [N, T])."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(tuple(x.to(device) for x in self.inputs), self.targets.to(device))


class Split(SourceSplit, Protocol):
    """One part of a data set; random access, so that epochs can be shuffled and classes picked."""

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]; [len, T] where a task without classes predicts sequences."""
        ...

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's content; equal content has equal hashes."""
        ...

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`.

        Raises:
            DataError: a sample cannot be read or is not finite; names it.
        """
        ...


class Task(Source, Protocol):
    """What the pipeline and the report ask of a task beside what the export asks (see `Source`: names, labels, axes).

    `ImageClassification` is one; write your own freely.
    """

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the data come from (files and their sha256, fonts), JSON; part of the data's digest; may be empty."""
        ...

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        ...

    def loss(self, logits: Any, targets: Tensor) -> Tensor:
        """Mean training loss, scalar, of the tensor of the answer; of several answers of a dict of tensors by name."""
        ...

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        ...

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A random variation of a training batch; the identity where there is none."""
        ...


@runtime_checkable
class FromFiles(Protocol):
    """A task, or a split of one, whose data lie in files: a run stops when one of them is edited meanwhile."""

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """Every file, with the `pipeline.sources.content_digest` of what was read."""
        ...


@runtime_checkable
class TargetsInParts(Protocol):
    """A split whose targets are too large to be held, such as maps in files: some at a time."""

    def targets_of(self, rows: Sequence[int]) -> Tensor:
        """The targets of `rows`, [N, ...].

        Raises:
            DataError: one cannot be read; names it.
        """
        ...


def target_parts(split: Split) -> Iterator[Tensor]:
    """All targets of `split` in order, some at a time where they are not held (`TargetsInParts`)."""
    if not isinstance(split, TargetsInParts):
        yield split.targets
        return
    for start in range(0, len(split), _ROWS_AT_ONCE):
        yield split.targets_of(range(start, min(start + _ROWS_AT_ONCE, len(split))))


@runtime_checkable
class ShowsClasses(Protocol):
    """A task of which a sample shows any number of classes: several labels, classes of pixels, boxes.

    `Task.labels` stays what each row as a whole is one of, and is () here. What decides between classes or judges by
    them takes a sample for every class that it shows, with that class's part of the loss (METHODS §1.3).
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        ...

    def classes_present(self, targets: Tensor) -> Tensor:
        """Which classes each sample of a batch shows, bool [N, C].

        Args:
            targets: of a batch, as `Batch.targets`.
        """
        ...

    def class_loss(self, output: Any, targets: Tensor, index: int) -> Tensor:
        """Mean over the samples of the part of the loss that is class `index`'s, scalar.

        Args:
            output: as `Task.loss` takes it.
            targets: of a batch.
            index: of the class.
        """
        ...


@runtime_checkable
class ReadsModel(Protocol):
    """A task that depends on the model, such as on the anchors of its head: a run shows it the base model first."""

    @property
    def reads_model(self) -> bool:
        """Whether it still has to see the model."""
        ...

    def for_model(self, model: nn.Module) -> Task:
        """The task for `model`.

        Args:
            model: before all stages.

        Raises:
            ModelError: the model does not tell what the task has to know.
        """
        ...


def names_of_classes(task: Task) -> tuple[str, ...]:
    """Names of the classes of `task`, whether each row is one of them or shows several; () where there are none."""
    if task.labels:
        return tuple(task.labels)
    return task.class_names if isinstance(task, ShowsClasses) else ()


def split_presence(task: Task, split: Split) -> Tensor:
    """`presence` of every sample of `split`, bool [len, C]; holds no more targets than the split does."""
    return torch.cat([presence(task, targets) for targets in target_parts(split)])


def presence(task: Task, targets: Tensor) -> Tensor:
    """Which classes each sample has, bool [N, C]; a row of one class has that one, and none if it is no class.

    Args:
        task: with classes of either sort, see `names_of_classes`.
        targets: of a batch, [N, ...].
    """
    if task.labels or not isinstance(task, ShowsClasses):
        return targets[:, None] == torch.arange(len(task.labels), device=targets.device)
    return task.classes_present(targets)


def named_outputs(output: Any, specs: Sequence[AnswerSpec]) -> Any:
    """What the task's loss and metric get of a model's `output`: the tensor of the answer; of several a dict by name.

    Raises:
        ModelError: there is no tensor where an answer should be.
    """
    if len(specs) == 1 and specs[0].leaf is None:
        return output
    try:
        leaves = leaves_of(output, specs)
    except ExportError as error:
        raise ModelError(str(error)) from None
    if len(specs) == 1:
        return leaves[0]
    return {spec.name: leaf for spec, leaf in zip(specs, leaves, strict=True)}


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


def split_of(task: Task, name: SplitName, needed_by: str) -> Split:
    """The split called `name`.

    Raises:
        DataError: the task has none.
    """
    if name not in task.splits:
        raise DataError(f"the task {task.name!r} has no {name!r} split, which {needed_by} needs: add it to the task")
    return task.splits[name]


def samples_per_class(targets: Tensor, classes: int) -> Tensor:
    """Number of samples of every class, int64 [classes]; targets of any shape, those that are no class count for none.

    Args:
        targets: whole numbers; `IGNORED` and others outside of the classes may be among them.
        classes: their number.
    """
    flat = targets.flatten()
    return torch.bincount(flat[(flat >= 0) & (flat < classes)].to(torch.int64), minlength=classes)


def classes_without_samples(task: Task, split: Split) -> list[str]:
    """Names of the classes of `task` that no sample of `split` has or shows."""
    counts = split_presence(task, split).sum(dim=0).tolist()
    return [name for name, count in zip(names_of_classes(task), counts, strict=True) if count == 0]


def check_unique(labels: Sequence[str], name: str) -> None:
    """Refuses two classes of one name.

    Raises:
        DataError: names the label and both classes.
    """
    first: dict[str, int] = {}
    for index, label in enumerate(labels):
        if first.setdefault(label, index) != index:
            raise DataError(
                f"the task {name!r} has the label {label!r} twice, for the classes {first[label]} and {index}: reports "
                "and answers go by the label, give every class one of its own"
            )


def check_classes(task: Task, name: SplitName, needed_by: str) -> None:
    """Refuses a task without classes, and a split in which a class has no sample.

    Raises:
        DataError: says so, or names the class.
    """
    split = split_of(task, name, needed_by)
    names = names_of_classes(task)
    if not names:
        raise DataError(
            f"the task {task.name!r} has no classes (no labels), and {needed_by} decides between classes or judges by "
            "them: leave it out for this task"
        )
    empty = classes_without_samples(task, split)
    if empty:
        raise DataError(
            f"class {empty[0]!r} has no sample in the {name!r} split ({len(empty)} such classes), which "
            f"{needed_by} needs: add samples of it, or remove it from the labels"
        )


def data_digests(task: Task) -> dict[str, str]:
    """sha256 of every split's content, in order of its samples, and of the task's `provenance` if there is any.

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
        for targets in target_parts(split):
            whole.update(targets.numpy().tobytes())
        digests[name] = whole.hexdigest()
    if task.provenance:
        text = json.dumps(task.provenance, sort_keys=True, ensure_ascii=True)
        digests["provenance"] = hashlib.sha256(text.encode()).hexdigest()
    return digests
