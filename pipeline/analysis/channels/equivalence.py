"""Proof by running: a narrowed model must compute what the same model computes with those channels masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgewright.models.sources.module_state import copied

from ...errors import StageError
from .modes import plain_eval
from .surgery import Keep, masked, pruned

_ROUNDING = 1e-4
"""A difference that rounding could still make, of numbers of the size that networks answer with."""


def failures(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    keep_of: Callable[[Mapping[str, Tensor]], Keep],
    kept: Mapping[str, Tensor],
) -> dict[str, str]:
    """Which groups cannot be cut as `kept` says, with the reason; all are tried together first.

    Args:
        model: unchanged.
        inputs: for the runs, positional.
        keep_of: turns kept units of groups into a cut.
        kept: group name -> units that stay.
    """
    if not kept or difference(model, inputs, keep_of(kept)) is None:
        return {}
    wrong: dict[str, str] = {}
    for name, units in kept.items():
        reason = difference(model, inputs, keep_of({name: units}))
        if reason is not None:
            wrong[name] = reason
    rest = {name: units for name, units in kept.items() if name not in wrong}
    if rest and difference(model, inputs, keep_of(rest)) is not None:
        # each works alone but not all together: take them in one by one
        taken: dict[str, Tensor] = {}
        for name, units in rest.items():
            reason = difference(model, inputs, keep_of({**taken, name: units}))
            if reason is None:
                taken[name] = units
            else:
                wrong[name] = reason
    return wrong


@torch.no_grad()
def probe(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy in which nothing is so small that a wrong cut would go unnoticed.

    Heads that start at zero and layer scales of 1e-6 hide what lies before them; a cut is right or wrong whatever the
    values are.
    """
    lively = copied(model)
    generator = torch.Generator().manual_seed(seed)
    for value in lively.parameters():
        if value.is_floating_point() and value.numel() and float(value.abs().max()) < 1e-3:
            fan_in = max(1, value[0].numel()) if value.dim() > 1 else 1
            noise = torch.randn(value.shape, generator=generator) / fan_in**0.5
            value.copy_(noise.to(value))
    theirs = [m for m in lively.modules() if not type(m).__module__.startswith("torch.nn.")]
    for buffer in (b for module in theirs for b in module._buffers.values() if b is not None and b.numel() > 1):
        # zeros may be meant as such: masks, counters, means
        if buffer.is_floating_point() and 0.0 < float(buffer.abs().max()) < 1e-3:
            buffer.copy_((0.5 + torch.rand(buffer.shape, generator=generator)).to(buffer))
    return lively


@torch.no_grad()
def difference(model: nn.Module, inputs: tuple[Tensor, ...], keep: Keep) -> str | None:
    """None if `pruned` and `masked` agree on `inputs`, else what is wrong.

    The tolerance is relative to what the cut changes: a wrong index map is an error of that size, rounding is not.
    Where an output almost cancels out, on one row of a single number for example, rounding is all that is left of it:
    a small difference is looked at again in float64.
    """
    wrong, distance = _difference(model, inputs, keep)
    if wrong is None or not distance <= _ROUNDING:
        return wrong
    try:
        exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        again, distance = _difference(copied(model).double(), exact, keep)
    except Exception:  # code that does not run in float64 says nothing, and the first verdict holds
        return wrong
    return wrong if math.isinf(distance) else again


def _difference(model: nn.Module, inputs: tuple[Tensor, ...], keep: Keep) -> tuple[str | None, float]:
    """What is wrong, and by how much the outputs differ; infinitely where they cannot be compared."""
    with plain_eval(model):
        dense = _outputs(model, inputs)
        mask = _outputs(masked(model, keep), inputs)
        try:
            small = _outputs(pruned(model, keep), inputs)
        except Exception as error:  # a user's forward may raise anything when a width is written into it
            text = str(error).splitlines()[0] if str(error) else ""
            return (
                f"the model does not run with fewer of these channels ({type(error).__name__}: {text[:160]}): its code "
                "counts on their number; to prune them it would have to read it off the layers"
            ), math.inf
    if len(small) != len(mask) or any(a.shape != b.shape for a, b in zip(small, mask, strict=True)):
        return "the model's output has another shape with fewer of these channels", math.inf
    furthest, wrong = 0.0, None
    for whole, expected, found in zip(dense, mask, small, strict=True):
        if not torch.isfinite(whole).all():
            raise StageError("the model's output is NaN or infinite: check its weights and the scale of the data")
        scale = float((expected - whole).abs().max()) if whole.numel() else 0.0
        size = float(expected.abs().max()) if whole.numel() else 0.0
        distance = float((found - expected).abs().max()) if whole.numel() else 0.0
        if not distance <= 1e-3 * scale + 1e-6 * size and not distance <= furthest:
            furthest = distance
            wrong = (
                f"the narrowed model differs from the masked one by {distance:.2g}: an operation between its layers "
                "depends on the number or the order of these channels"
            )
    return wrong, furthest


@torch.no_grad()
def fails_in_training(model: nn.Module, inputs: tuple[Tensor, ...], keep: Keep) -> str | None:
    """Why the narrowed model cannot be trained, although the way that `model` goes in training works; else None.

    Only tried: dropout of other shapes draws other noise, so that there is nothing to compare.
    """
    small = pruned(model, keep)
    try:
        with plain_eval(small, training_branches=True):
            small(*inputs)
    except Exception as error:  # a user's forward may raise anything
        text = str(error).splitlines()[0] if str(error) else ""
        return (
            f"with fewer of these channels the model does not run as it does in training ({type(error).__name__}: "
            f"{text[:160]}): a branch that only training uses counts on their number; build the model without it"
        )
    return None


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # a model may draw noise in eval mode: the same for all that are compared
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = tree_leaves(model.eval()(*inputs))
    return [leaf.to(torch.float64) for leaf in leaves if isinstance(leaf, Tensor)]
