"""Which samples are scored for a class, and of which loss the gradient is taken (METHODS §1.3).

Where each row is of one class these are its rows and their cross entropy. Where a sample shows several classes it is
scored for each of them, with that class's part of the task's loss. Without classes all samples are scored at once, with
the task's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from edgewright.export.source import answers_of

from ...errors import StageError
from ...stage import Context
from ...task import ShowsClasses, Split, Task, named_outputs, names_of_classes, split_presence

CLASSES_OF_NONE = 10
"""So many times `images_per_class` samples are looked at where the task has no classes."""

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""Mean loss, scalar, of an output [N, ...], or of several by name, and targets [N, ...]."""

_FLOATS = (torch.float32, torch.float64)


class Effect(NamedTuple):
    """The gradient of each of N samples' own loss at what the model returns.

    Attributes:
        outputs: of the model, each [N, ...].
        directions: like them; the gradient, times one positive number for each sample.
        size: [N], that number's inverse.
    """

    outputs: tuple[Tensor, ...]
    directions: tuple[Tensor, ...]
    size: Tensor


class ScoredSamples:
    """The samples of `split` by the classes of `task`.

    Args:
        task: with classes of either sort, or none.
        split: of it.
    """

    def __init__(self, task: Task, split: Split) -> None:
        self.names = names_of_classes(task)
        self._task, self.split = task, split
        self._specs = answers_of(task)
        self._present = split_presence(task, split) if self.names else None
        self.classes: Sequence[int | None] = (None,)
        if self._present is not None:
            found = self._present.any(dim=0).nonzero().flatten().tolist()
            self.classes = list(range(len(self.names))) if task.labels else found or [None]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the classes that no sample shows."""
        return tuple(name for index, name in enumerate(self.names) if index not in self.classes)

    def by_class(self, rows: Tensor) -> Tensor:
        """`rows` [classes that samples show, ...] with a row of zeros for each of the others, [C, ...]."""
        whole = rows.new_zeros(len(self.names), *rows.shape[1:])
        whole[[label for label in self.classes if label is not None]] = rows
        return whole

    def chosen(self, label: int | None, most: int, context: Context) -> Tensor:
        """Rows that are scored for the class `label`, at most `most`; ten times as many of all rows without classes."""
        if label is None or self._present is None:
            rows, most, name = torch.arange(len(self.split)), CLASSES_OF_NONE * most, -1
        else:
            rows, name = self._present[:, label].nonzero().flatten(), label
        order = torch.randperm(len(rows), generator=context.generator("scoring images", name))
        return rows[order[:most]].sort().values

    def gradients(self, output: Any, targets: Tensor, label: int | None) -> Effect:
        """Of samples of a class at what the model returned for them; of the whole loss for the class None.

        Raises:
            StageError: the output is not what the task's answers say, or not float32.
        """
        found = named_outputs(output, self._specs)
        task = self._task
        if task.labels and not isinstance(found, Mapping):
            _check(found, len(targets), len(task.labels))
            direction, size = logit_gradients(found, targets)
            return Effect((found,), (direction,), size)
        loss: Loss = task.loss
        if label is not None and isinstance(task, ShowsClasses):
            loss = partial(_of_class, task, label)
        for tensor in found.values() if isinstance(found, Mapping) else (found,):
            _check(tensor, len(targets))
        return loss_gradients(loss, found, targets)


def logit_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each sample's own cross entropy at its logits, as direction and size.

    A sample so confident that its gradient is exactly 0 in float32 would vanish from every count and take its class
    along, so the direction is then that of the target logit, of size 0. Directions are scaled to largest entry 1 lest
    the gradient of an almost confident sample underflows on its way back.

    Args:
        logits: float32 [N, C].
        targets: int64 [N].

    Returns:
        directions [N, C] and sizes [N]; the gradient is their product.
    """
    onehot = nn.functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
    gradient = torch.softmax(logits.detach(), dim=1) - onehot
    size = gradient.abs().amax(dim=1)
    direction = torch.where(size[:, None] > 0, gradient / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None], onehot)
    return direction, size


def loss_gradients(loss: Loss, output: Any, targets: Tensor) -> Effect:
    """Gradient of each sample's loss at its output or outputs, as direction and size like `logit_gradients`.

    Args:
        loss: a mean over the samples, so N times its gradient is that of each.
        output: [N, ...], or several by name.
        targets: [N, ...].

    Returns:
        Outputs that a gradient can come back from, with directions of largest entry 1 over all outputs of a sample, or
        0 where there is no gradient.
    """
    named = output if isinstance(output, Mapping) else {"": output}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    value = loss(leaves if isinstance(output, Mapping) else leaves[""], targets) * len(targets)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    outputs, parts = [], []
    for tensor, gradient in zip(named.values(), gradients, strict=True):
        if gradient is not None and (tensor.requires_grad or len(named) == 1):
            outputs.append(tensor)
            parts.append(gradient)
    if not parts:
        raise StageError("the task's loss depends on nothing that the model answers, so no filter changes it")
    size = torch.stack([part.abs().reshape(len(part), -1).amax(dim=1) for part in parts]).amax(dim=0)
    scale = size.clamp_min(torch.finfo(size.dtype).tiny)
    directions = tuple(part / scale.view(-1, *[1] * (part.dim() - 1)) for part in parts)
    return Effect(tuple(outputs), directions, size)


def _of_class(task: ShowsClasses, label: int, output: Any, targets: Tensor) -> Tensor:
    return task.class_loss(output, targets, label)


def _check(output: Any, rows: int, classes: int = 0) -> None:
    """Refuses what is not `rows` rows of float32, or of logits where rows are of one of `classes`."""
    right = isinstance(output, Tensor) and output.dim() > 0 and len(output) == rows
    if not right or (classes and tuple(output.shape) != (rows, classes)):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        wanted = f"logits ({rows}, {classes}) are needed for scores per class" if classes else f"{rows} rows are needed"
        raise StageError(f"the model returns {shape} where {wanted}")
    if output.dtype not in _FLOATS:
        raise StageError(f"the model computes in {output.dtype}: class counts need float32, remove its autocast")
