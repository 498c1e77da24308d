"""What a model returned where logits were wanted, in words that say what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import ModelError


def training_logits(model: nn.Module, output: Any) -> Tensor:
    """`output` of `model` in training mode, if it is one tensor.

    Raises:
        ModelError: it is something else, as of networks that return auxiliary outputs while they are trained.
    """
    if isinstance(output, Tensor):
        return output
    raise ModelError(
        f"{type(model).__name__} returns {described(output)} in training mode, and one tensor of logits in eval mode: "
        "return the logits alone in both. Where auxiliary outputs can be turned off by an argument, do so under "
        "model.args; otherwise wrap the model in a module whose forward returns the logits only"
    )


def described(output: Any) -> str:
    """What a model returned, with the shapes inside."""
    if isinstance(output, Mapping):
        inside = ", ".join(f"{key!r}: {described(value)}" for key, value in output.items())
        return f"a {type(output).__name__} {{{inside}}}"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(map(described, output))})"
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    return f"a {type(output).__name__}"


def wrapping(output: Any, wanted: list[int]) -> str:
    """The adapter that would make a classifier of a model that returned `output`; logits `wanted` are what it needs."""
    entries = list(output.items()) if isinstance(output, Mapping) else []
    if isinstance(output, list | tuple):
        entries = list(enumerate(output))
    fitting = [key for key, value in entries if isinstance(value, Tensor) and list(value.shape) == wanted]
    needed = f"a classifier returns one tensor of logits {wanted}: wrap it in a module"
    if not fitting:
        return f"{needed} whose forward returns only those"
    return f"{needed} whose forward is `return self.model(*inputs)[{fitting[0]!r}]`"
