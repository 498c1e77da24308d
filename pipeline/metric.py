"""Quality as a task judges it: one value that recipes set tolerances for, and per class where there are classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from edgewright.models.layers.multi_exit import ExitOutput

from .errors import DataError

IGNORED = -100
"""The target of a position where nothing is predicted, torch's own."""

Output: TypeAlias = Tensor | ExitOutput | Mapping[str, Tensor]
"""What a model answers: one tensor, with exits the decision of every row, or of several answers a tensor by name."""


class Answer(NamedTuple):
    """A model's output for one batch, and what would have been right; on the CPU."""

    output: Output
    targets: Tensor


@dataclass(frozen=True)
class Score:
    """Quality on one split.

    Attributes:
        value: the metric itself, in its own unit.
        rows: number of samples.
        accuracy: share of rows that are right; None where rows are not right or wrong.
        worst_class_accuracy: the lowest accuracy of a class that has samples; None without classes.
        per_class: accuracy of every class, None where the split has no sample of it; empty without classes.
    """

    value: float
    rows: int
    accuracy: float | None = None
    worst_class_accuracy: float | None = None
    per_class: tuple[float | None, ...] = ()


class Metric(Protocol):
    """How the answers of a model are judged.

    `Accuracy` and `BalancedAccuracy` are two; a task may bring its own.
    """

    @property
    def name(self) -> str:
        """As reports show it."""
        ...

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once, batch by batch; keeps no logits.

        Args:
            answers: of all samples of a split, in order.
        """
        ...

    def drop(self, before: float, after: float) -> float:
        """How much worse the value `after` is than `before`, in the unit of recipes' tolerances.

        0 for equal, negative for better. A metric that is better when lower (perplexity) says so here.
        """
        ...


class ClassScore:
    """Base of metrics over classes: counts what is right, overall and per class.

    Args:
        classes: number of classes.
    """

    name = ""

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def value(self, accuracy: float, present: tuple[float, ...]) -> float:
        """The metric, from the share of right rows and the accuracy of every class that has samples."""
        raise NotImplementedError

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; a row's class is the decision of a network with exits, else the largest logit."""
        hits = torch.zeros(self._classes, dtype=torch.int64)
        counts = torch.zeros(self._classes, dtype=torch.int64)
        for output, targets in answers:
            known = targets >= 0  # the others are `IGNORED`
            hits += torch.bincount(targets[known & (labels_of(output) == targets)], minlength=self._classes)
            counts += torch.bincount(targets[known], minlength=self._classes)
        rows = int(counts.sum())
        per_class = tuple(h / c if c else None for h, c in zip(hits.tolist(), counts.tolist(), strict=True))
        present = tuple(p for p in per_class if p is not None)
        accuracy = int(hits.sum()) / rows if rows else 0.0
        return Score(self.value(accuracy, present), rows, accuracy, min(present, default=0.0), per_class)

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


class Accuracy(ClassScore):
    """Share of rows that are right."""

    name = "accuracy"

    def value(self, accuracy: float, present: tuple[float, ...]) -> float:
        """`accuracy`."""
        del present
        return accuracy


class BalancedAccuracy(ClassScore):
    """Mean accuracy of the classes that have samples: rare classes weigh as much as frequent ones."""

    name = "balanced_accuracy"

    def value(self, accuracy: float, present: tuple[float, ...]) -> float:
        """The mean of `present`."""
        del accuracy
        return sum(present) / len(present) if present else 0.0


class Perplexity:
    """``exp`` of the mean loss per predicted token (METHODS §3.7); lower is better.

    Logits are [N, T, V] and targets [N, T], -100 where nothing is predicted. `drop` is relative: 0.05 is a
    perplexity 5 % higher.
    """

    name = "perplexity"

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; sums the loss window by window, so that no second copy of the logits is made."""
        total, tokens, rows = 0.0, 0, 0
        for output, targets in answers:
            assert isinstance(output, Tensor)
            for logits, wanted in zip(output, targets, strict=True):
                loss = nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
                total += float(loss)
                tokens += int((wanted != IGNORED).sum())
                rows += 1
        # beyond exp(700) a float has no value: a diverged model is infinitely perplexed
        mean = total / tokens if tokens else math.inf
        return Score(math.exp(mean) if mean < 700.0 else math.inf, rows)

    def drop(self, before: float, after: float) -> float:
        """The relative growth: less is better."""
        return after / before - 1.0


_SHIPPED: dict[str, Callable[[int], Metric]] = {m.name: m for m in (Accuracy, BalancedAccuracy)}


def metric_named(name: str, classes: int) -> Metric:
    """A metric that ships.

    Args:
        name: ``accuracy`` or ``balanced_accuracy``.
        classes: number of classes.

    Raises:
        DataError: an unknown name.
    """
    if name not in _SHIPPED:
        raise DataError(f"unknown metric {name!r}; there are {', '.join(_SHIPPED)}, or pass an object that is a Metric")
    return _SHIPPED[name](classes)


def within(metric: Metric, before: float, after: float, tolerance: float) -> bool:
    """True if `after` is worse than `before` by no more than `tolerance`, which a recipe wrote in decimal."""
    # 0.95 - 0.94 is a little more than 0.01
    return metric.drop(before, after) <= tolerance + 1e-9


def labels_of(output: Output) -> Tensor:
    """Class indices int64 [N] of logits [N, C] or of decisions."""
    if isinstance(output, ExitOutput):
        return output.label
    assert isinstance(output, Tensor), "of several answers the task's own metric picks one"
    return output.argmax(dim=1)
