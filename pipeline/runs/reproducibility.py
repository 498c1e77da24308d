"""A model that cannot be built again from its state dict is refused before hours go into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..stage import Json
from ..store.late_tensors import late_tensors, register_late


@torch.no_grad()
def check_reproducible(model: nn.Module, other: nn.Module, inputs: Sequence[Tensor], name: str) -> dict[str, Json]:
    """Holds two builds of one model, made under different seeds, against each other.

    A checkpoint keeps parameters and persistent buffers; everything else comes from building the model again. So
    with the state of the first loaded into the second, both must be equal.

    Args:
        model: eval mode, on the CPU.
        other: built by the same call under another seed; gets the state of `model`.
        inputs: of some rows.
        name: the model's, for the messages.

    Returns:
        What its first call registers, see `late_tensors`.

    Raises:
        ModelError: names the buffer or attribute that differs, or says that the forward pass itself is random.
    """
    late, state = late_tensors(model, other), model.state_dict()
    try:
        register_late(other, late).load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name}: built twice with the same arguments, its parameters differ in name or shape "
            f"({str(error).splitlines()[-1].strip()}): sizes must depend on the arguments, not on random numbers"
        ) from None
    first, second = model(*inputs), model(*inputs)
    if not _equal(first, second):
        raise ModelError(
            f"{name} answers the same rows differently each time, in eval mode: its forward pass draws random "
            "numbers (dropout with training=True?); nothing that is exported could be proven equal to it"
        )
    # called before it is compared: what a model makes at its first call is no part of how it is built
    answer = other.eval()(*inputs)
    kept = state.keys()
    mine, others = dict(_values(model)), dict(_values(other))
    for key in sorted(mine.keys() | others.keys()):
        if key in kept or (key in mine and key in others and _equal(mine[key], others[key])):
            continue
        raise ModelError(
            f"{name}: {key!r} has other values each time the model is built, and no checkpoint keeps it: make it a "
            "parameter or a persistent buffer (register_buffer), or compute it without random numbers"
        )
    if not _equal(first, answer):
        raise ModelError(
            f"{name}: built twice, it answers differently although all parameters and buffers are equal: it keeps "
            "random values outside of them (a list of tensors, a number), or makes parameters anew at its first call; "
            "register them as buffers when it is built"
        )
    return late


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict leaves out, and tensors that are plain attributes of modules, by path."""
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (f"{path}.{key}" if path else key), value


def _equal(a: Any, b: Any) -> bool:
    """Equal values, NaN to NaN; of a tuple or mapping of tensors in every one."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        ours, theirs = ([x for x in tree_leaves(value) if isinstance(x, Tensor)] for value in (a, b))
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
