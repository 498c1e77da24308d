"""Label smoothing of a task's own loss, whatever it is made of: weights, ignored targets, sequences, further terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RecipeError
from ..task import Task

_CROSS_ENTROPIES = (nn.functional.cross_entropy, nn.functional.nll_loss)


def smoothed_loss(task: Task, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The task's own loss, in which every cross entropy spreads a share of the target's mass over all classes.

    The share goes to `torch.nn.functional.cross_entropy` where the task calls it, so that weights of classes, ignored
    targets, the axis of the classes and all else that the loss is made of stay what they are.

    Args:
        task: whose loss.
        logits: what the model returned.
        targets: of the batch.
        smoothing: share in [0, 1); 0 is the task's loss as it is.

    Returns:
        The mean loss, scalar.

    Raises:
        RecipeError: the loss is no cross entropy over classes, or it smooths the targets itself.
    """
    if smoothing == 0.0:
        return task.loss(logits, targets)
    mode = _Smoothing(smoothing)
    with mode:
        loss = task.loss(logits, targets)
    if mode.found:
        return loss
    raise RecipeError(
        f"label_smoothing is {smoothing:g}, and the loss of the task {task.name!r} calls no "
        "torch.nn.functional.cross_entropy (or nll_loss) whose targets could be smoothed: only a cross entropy over "
        "classes has them. Leave label_smoothing out, or smooth inside the task's own loss"
    )


class _Smoothing(TorchFunctionMode):
    """Hands a share to every cross entropy that is computed under it."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        del types
        given = dict(kwargs or {})
        if func not in _CROSS_ENTROPIES:
            return func(*args, **given)
        self.found = True
        # nll_loss has the same arguments in the same order, less this one, which is the last
        if given.get("label_smoothing", 0.0) or len(args) > 7:
            raise RecipeError(
                f"label_smoothing is {self.smoothing:g}, and the task's own loss smooths its targets already: leave "
                "one of them out"
            )
        # log probabilities, which nll_loss takes, are their own log softmax
        return nn.functional.cross_entropy(*args, **{**given, "label_smoothing": self.smoothing})
