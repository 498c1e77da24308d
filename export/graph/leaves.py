"""The tensors that a model's answers lie in: it returns one, or a tuple, a list or a mapping of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from edgewright.edge_runtime.answers.values import VALUES
from edgewright.edge_runtime.bundle.manifest import LOGITS, AnswerSpec
from edgewright.edge_runtime.errors import ExportError

ONE_TENSOR = (AnswerSpec(LOGITS, VALUES),)
"""For a model that returns one tensor, whatever it means."""


def leaves_of(output: Any, answers: Sequence[AnswerSpec]) -> tuple[Tensor, ...]:
    """The tensor of every answer, in their order.

    Args:
        output: what the model returned.
        answers: say where they lie, see `AnswerSpec.leaf`.

    Raises:
        ExportError: there is none at a place; says what is.
    """
    return tuple(_leaf(output, spec) for spec in answers)


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


def _leaf(output: Any, spec: AnswerSpec) -> Tensor:
    found = output
    if spec.leaf is not None:
        try:
            if isinstance(spec.leaf, str) and not isinstance(output, Mapping):
                found = getattr(output, spec.leaf)  # of a named tuple or a dataclass
            else:
                found = output[spec.leaf]
        except (LookupError, TypeError, AttributeError):
            found = None
    if isinstance(found, Tensor) and not (spec.leaf is not None and isinstance(output, Tensor)):
        return found
    where = "one tensor" if spec.leaf is None else f"a tensor at {spec.leaf!r}"
    raise ExportError(
        f"the answer {spec.name!r} ({spec.kind}) is {where}, and the model returns {described(output)}: name the leaf "
        "in the task's `answers`, an index of a tuple or a key of a mapping"
    )
