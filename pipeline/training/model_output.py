"""What a model returned where one tensor was wanted, in words that say what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.export.graph.leaves import ONE_TENSOR, described

from ..errors import ModelError
from ..task import named_outputs


def training_logits(model: nn.Module, output: Any, specs: Sequence[AnswerSpec] = ONE_TENSOR) -> Any:
    """`output` of `model` in training mode as `named_outputs` gives it, if it is what the answers say.

    Raises:
        ModelError: it is something else, as of networks that return auxiliary outputs while they are trained.
    """
    output = named_outputs(output, specs)
    if isinstance(output, Tensor) or len(specs) > 1:
        return output
    raise ModelError(
        f"{type(model).__name__} returns {described(output)} in training mode, and one tensor is needed there as in "
        "eval mode. Where auxiliary outputs can be turned off by an argument, do so under model.args; otherwise wrap "
        "the model in a module whose forward returns the same one tensor in both modes"
    )


def wrapping(output: Any, in_training: Any, rows: int, classes: int) -> str:
    """The adapter that would make a model fit which returned `output`, no tensor.

    Args:
        output: of eval mode.
        in_training: of training mode, None where that is not known.
        rows: that it was given.
        classes: number of the task's classes; 0 without classes, where any float tensor with the rows first will do.
    """
    entries = list(output.items()) if isinstance(output, Mapping) else []
    if isinstance(output, list | tuple):
        entries = list(enumerate(output))
    fitting = {key: value for key, value in entries if _fits(value, rows, classes)}
    logits = {key: value for key, value in fitting.items() if not (classes and _are_probabilities(value))}
    wanted = f"one tensor of logits {[rows, classes]}" if classes else "one float tensor, its first axis the rows"
    needed = f"{wanted} is needed, in eval mode and in training mode: wrap it in a module"
    key = next(iter(logits or fitting), None)
    if key is None:
        return f"{needed} whose forward returns only that"
    if isinstance(in_training, Tensor):
        return (
            f"{needed} whose forward is `out = self.model(*inputs)` and `return out if isinstance(out, torch.Tensor) "
            f"else out[{key!r}]`, because in training mode it returns the tensor alone"
        )
    return f"{needed} whose forward is `return self.model(*inputs)[{key!r}]`"


def _fits(value: Any, rows: int, classes: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0 or len(value) != rows:
        return False
    return not classes or list(value.shape) == [rows, classes]


def _are_probabilities(values: Tensor) -> bool:
    """Whether a softmax has been taken already, as of networks that return both."""
    sums = values.sum(dim=-1)
    return bool((values >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
