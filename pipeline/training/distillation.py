"""How far a model's answer is from that of another model: over classes or tokens, or as values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..task import Batch, Split, Task

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


class Distillation:
    """The distance of a model's answer to a teacher's, in a unit that does not depend on the task.

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
        answer: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
        device: torch.device,
    ) -> None:
        self._teacher, self._answer = teacher, answer
        self._labels = len(task.labels)
        self._split, self._device = split, device
        self._spread: Tensor | None = None

    def __call__(self, found: Tensor, batch: Batch) -> Tensor:
        """Scalar: the divergence per row or token, or the mean squared error over the variance of the teacher's values.

        Args:
            found: the model's answer, float32.
            batch: what it answered.
        """
        with torch.no_grad():
            expected = self._answer(self._teacher, batch.inputs)
        axis = class_axis(expected, batch.targets, self._labels)
        if axis is not None:
            return divergence(found, expected, axis)
        if self._spread is None:
            self._spread = self._measured()
        return (found - expected).square().mean() / self._spread

    @torch.no_grad()
    def _measured(self) -> Tensor:
        """The variance of the teacher's values, the same at every start; 1 where they do not vary."""
        rows = torch.arange(min(len(self._split), _ROWS))
        chunks = torch.split(rows, getattr(self._split, "largest_batch", _ROWS))
        values = [self._answer(self._teacher, self._split.batch(c).to(self._device).inputs).flatten() for c in chunks]
        spread = torch.cat(values).var(correction=0)
        return spread if float(spread) > 0.0 else torch.ones_like(spread)
