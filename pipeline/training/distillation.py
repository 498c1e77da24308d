"""How far a model's answers are from those of another model: over classes or tokens, or as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.table import kind_of
from edgewright.export.source import Answering, answers_of

from ..task import Batch, Split, Task

Answered: TypeAlias = Tensor | Mapping[str, Tensor]
"""As `pipeline.task.named_outputs` gives it: one tensor, or of several answers one by name."""

_ROWS = 64
"""Samples that the spread of a teacher's values is measured on."""


def class_axis(logits: Tensor, targets: Tensor, labels: int) -> int | None:
    """The axis of `logits` that holds one number per class or token; None where they are values.

    Whole numbers as targets, one for each place, say which class is right there; other targets are values themselves
    (of a regression), or a number for every class (several of which may be right, so no share of one whole).

    Args:
        logits: [N, C], [N, C, ...] or [N, ..., V].
        targets: of the same samples.
        labels: how many classes the task names, 0 for none.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool or logits.ndim < 2:
        return None
    for axis in (1, logits.ndim - 1) if labels else (logits.ndim - 1, 1):
        places = [size for place, size in enumerate(logits.shape) if place != axis]
        wanted = logits.shape[axis] == labels if labels else logits.shape[axis] > 1
        if wanted and list(targets.shape) == places:
            return axis
    return None


def divergence(found: Tensor, expected: Tensor, axis: int) -> Tensor:
    """Mean Kullback-Leibler divergence of ``softmax(found)`` from ``softmax(expected)`` over `axis`, scalar.

    Args:
        found: logits of the model, float32.
        expected: logits of the teacher, the same shape.
        axis: of the classes; the mean goes over everything else.
    """
    p = expected.log_softmax(dim=axis)
    q = found.log_softmax(dim=axis)
    return (p.exp() * (p - q)).sum(dim=axis).mean()


def binary_divergence(found: Tensor, expected: Tensor) -> Tensor:
    """Mean divergence of ``sigmoid(found)`` from ``sigmoid(expected)``, scalar: of classes of which several may be
    right, each a decision of its own.

    Args:
        found: logits of the model, float32.
        expected: logits of the teacher, the same shape.
    """
    p = expected.sigmoid()
    cross, own = (nn.functional.binary_cross_entropy_with_logits(logits, p) for logits in (found, expected))
    return cross - own


class Distillation:
    """The distance of a model's answers to a teacher's, in a unit that does not depend on the task.

    Args:
        teacher: in eval mode, where the batches are.
        task: tells classes from values.
        split: the spread of the teacher's values is measured on its first samples.
        answer: runs a model on inputs, float32.
        device: of the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        task: Task,
        split: Split,
        answer: Callable[[nn.Module, tuple[Tensor, ...]], Answered],
        device: torch.device,
    ) -> None:
        self._teacher, self._answer = teacher, answer
        self._labels = len(task.labels)
        # a task that does not say what it answers is known by its targets
        specs = answers_of(task) if isinstance(task, Answering) else ()
        self._kinds = {spec.name if len(specs) > 1 else "": kind_of(spec) for spec in specs}
        self._split, self._device = split, device
        self._spread: dict[str, Tensor] | None = None

    def __call__(self, found: Answered, batch: Batch) -> Tensor:
        """Scalar: the mean over the answers of each one's distance.

        That is the divergence per row, place or token, or the mean squared error over the variance of the teacher's
        values.

        Args:
            found: the model's answers, float32.
            batch: what it answered.
        """
        with torch.no_grad():
            expected = _by_name(self._answer(self._teacher, batch.inputs))
        given = _by_name(found)
        parts = [self._distance(name, given[name], expected[name], batch.targets) for name in expected]
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean()

    def _distance(self, name: str, found: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
        kind = self._kinds.get(name)
        axis = class_axis(expected, targets, self._labels) if kind is None else kind.class_axis
        # a single logit has a softmax of 1; boxes have coordinates before the classes, which are values
        known = kind is not None and kind.before_classes == 0 and axis is not None
        if known and kind is not None and not kind.one_is_right:
            return binary_divergence(found, expected)
        if axis is not None and (kind is None or (known and expected.shape[axis] > 1)):
            return divergence(found, expected, axis)
        if self._spread is None:
            self._spread = self._measured()
        return (found - expected).square().mean() / self._spread[name]

    @torch.no_grad()
    def _measured(self) -> dict[str, Tensor]:
        """The variance of the teacher's values by answer, the same at every start; 1 where they do not vary."""
        rows = torch.arange(min(len(self._split), _ROWS))
        chunks = torch.split(rows, getattr(self._split, "largest_batch", _ROWS))
        values: dict[str, list[Tensor]] = {}
        for chunk in chunks:
            answered = self._answer(self._teacher, self._split.batch(chunk).to(self._device).inputs)
            for name, tensor in _by_name(answered).items():
                values.setdefault(name, []).append(tensor.flatten())
        spread = {name: torch.cat(parts).var(correction=0) for name, parts in values.items()}
        return {name: one if float(one) > 0.0 else torch.ones_like(one) for name, one in spread.items()}


def _by_name(answered: Answered) -> Mapping[str, Tensor]:
    return answered if isinstance(answered, Mapping) else {"": answered}
