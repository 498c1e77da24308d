"""Quality as a task judges it: one value that recipes set tolerances for, and per class where there are classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
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
        each: [rows] what every row is worth, of which the metric is the mean; or [rows, S] what every row adds to a
            metric that `value_of` makes of them, see `OverRows`. None where a metric is not made of rows: then there
            is no interval of a difference.
        right: bool [rows] whether each row is right; None where rows are not right or wrong.
    """

    value: float
    rows: int
    accuracy: float | None = None
    worst_class_accuracy: float | None = None
    per_class: tuple[float | None, ...] = ()
    each: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    right: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


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


@runtime_checkable
class OverRows(Protocol):
    """A metric that is no mean over rows, and can be told of any choice of them by what each adds (`Score.each`)."""

    def value_of(self, each: NDArray[Any]) -> float:
        """The metric of some rows.

        Args:
            each: [rows, S], as `Score.each` has it; NaN is returned where the metric is not defined.
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
        found, wanted = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.int64)]
        for output, targets in answers:
            known = targets >= 0  # the others are `IGNORED`
            found.append((labels_of(output) == targets)[known].flatten())
            wanted.append(targets[known].flatten())
        right, classes = torch.cat(found), torch.cat(wanted)
        hits = torch.bincount(classes[right], minlength=self._classes)
        counts = torch.bincount(classes, minlength=self._classes)
        rows = len(right)
        per_class = tuple(h / c if c else None for h, c in zip(hits.tolist(), counts.tolist(), strict=True))
        present = tuple(p for p in per_class if p is not None)
        accuracy = int(hits.sum()) / rows if rows else 0.0
        value, worst = self.value(accuracy, present), min(present, default=0.0)
        return Score(value, rows, accuracy, worst, per_class, self.each(right.numpy(), classes.numpy()), right.numpy())

    def each(self, right: NDArray[np.bool_], classes: NDArray[np.int64]) -> NDArray[Any] | None:
        """`Score.each`, from whether every row is right [rows] and its class [rows]; None if it is not known."""
        del right, classes
        return None

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

    def each(self, right: NDArray[np.bool_], classes: NDArray[np.int64]) -> NDArray[Any]:
        """1 for a row that is right, 0 for one that is not."""
        del classes
        return right


class BalancedAccuracy(ClassScore):
    """Mean accuracy of the classes that have samples: rare classes weigh as much as frequent ones."""

    name = "balanced_accuracy"

    def value(self, accuracy: float, present: tuple[float, ...]) -> float:
        """The mean of `present`."""
        del accuracy
        return sum(present) / len(present) if present else 0.0

    def each(self, right: NDArray[np.bool_], classes: NDArray[np.int64]) -> NDArray[Any]:
        """[rows, 2]: whether it is right, and its class."""
        return np.stack([right, classes], axis=1).astype(np.int32)

    def value_of(self, each: NDArray[Any]) -> float:
        """The mean accuracy of the classes of these rows."""
        hits = np.bincount(each[:, 1], weights=each[:, 0], minlength=self._classes)
        counts = np.bincount(each[:, 1], minlength=self._classes)
        there = counts > 0
        return float((hits[there] / counts[there]).mean()) if there.any() else math.nan


class Perplexity:
    """``exp`` of the mean loss per predicted token (METHODS §3.7); lower is better.

    Logits are [N, T, V] and targets [N, T], -100 where nothing is predicted. `drop` is relative: 0.05 is a
    perplexity 5 % higher.
    """

    name = "perplexity"

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; sums the loss window by window, so that no second copy of the logits is made."""
        total, tokens = 0.0, 0
        each: list[tuple[float, int]] = []
        for output, targets in answers:
            assert isinstance(output, Tensor)
            for logits, wanted in zip(output, targets, strict=True):
                loss = nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
                each.append((float(loss), int((wanted != IGNORED).sum())))
                total += each[-1][0]
                tokens += each[-1][1]
        return Score(_perplexity(total, tokens), len(each), each=np.asarray(each, np.float64).reshape(-1, 2))

    def value_of(self, each: NDArray[Any]) -> float:
        """From the loss and the number of tokens of some rows."""
        loss, tokens = each.sum(axis=0)
        return _perplexity(float(loss), int(tokens))

    def drop(self, before: float, after: float) -> float:
        """The relative growth: less is better."""
        return after / before - 1.0


def _perplexity(loss: float, tokens: int) -> float:
    # beyond exp(700) a float has no value: a diverged model is infinitely perplexed
    mean = loss / tokens if tokens else math.inf
    return math.exp(mean) if mean < 700.0 else math.inf


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
