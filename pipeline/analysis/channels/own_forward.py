"""Layers that compute in their own way: weight standardisation, gains, low-rank additions, parametrized weights.

Such a layer is a convolution, a linear layer or a normalisation by type, and has tensors that PyTorch's do not have.
Which of them have an axis of the channels is found by exchanging channels: only if a layer's weights and all of these
tensors are put into another order together do its outputs come in that order (or stay as they are, for its inputs).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.models.sources.module_state import copied

from .axes import (
    Side,
    block,
    channel_dim,
    has_derived_weight,
    is_convolution,
    is_following,
    is_mixing,
    sliced_tensors,
    width,
)
from .flow import Axis, Flow
from .surgery import Keep, pruned

_MOST_TENSORS = 6
"""Axes that are tried in every combination; of more only all together, and each alone."""


@dataclass(frozen=True)
class Exchange:
    """What exchanging channels says about one layer.

    Attributes:
        along: axes of its own tensors that go along with one of its sides; paths begin at the layer.
        stuck: sides that cannot be narrowed, with the reason.
    """

    along: list[tuple[Axis, Side]] = field(default_factory=list)
    stuck: dict[Side, str] = field(default_factory=dict)


def follow_own(model: nn.Module, flow: Flow, calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Adds to `flow` what goes along with the channels of layers with a forward of their own.

    Args:
        model: in eval mode.
        flow: opaque layers are left out.
        calls: positional and keyword arguments of one call of each such layer.
    """
    for path, (args, kwargs) in calls.items():
        if path in flow.opaque:
            continue
        layer = model.get_submodule(path)
        found = exchange(layer, args, kwargs)
        for (owner, at), side in found.along:
            axis = (f"{path}.{owner}" if path else owner, at)
            flow.along[axis] = (path, side)
            flow.widths[axis] = width(layer, side)
        flow.stuck.update({(path, side): reason for side, reason in found.stuck.items()})


def exchange(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exchange:
    """Finds which tensors of `layer` go along with its channels.

    Args:
        layer: mixing or following, with a forward of its own; unchanged.
        args: of a call, positional.
        kwargs: of that call.
    """
    grouped = is_convolution(layer) and getattr(layer, "groups", 1) > 1
    moves: list[tuple[Side, ...]] = [("in", "out")] if grouped else [("in",), ("out",)]
    if not is_convolution(layer) and not is_mixing(layer):
        moves = [("out",)]
    call = _Call(_lively(layer), args, kwargs)
    found = Exchange()
    for sides in moves:
        along = _along(call, sides)
        for side in sides:
            if along is None:
                found.stuck[side] = _places(layer)
            elif (reason := _narrowed(call, sides, along)) is not None:
                found.stuck[side] = reason
        found.along.extend(along or ())
    return found


class _Call:
    """One call of a layer, repeated with channels in another order, or with fewer of them."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.output = self.run(layer)

    def run(self, layer: nn.Module, index: Tensor | None = None) -> Tensor:
        """What `layer` gives; `index` selects channels of the input."""
        args, kwargs = self.args, self.kwargs
        if index is not None:
            x: Tensor = args[0] if args else kwargs["input"]
            x = x.index_select(channel_dim(self.layer, x), index)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output: Tensor = layer(*args, **kwargs)
        return output

    def selected(self, index: Tensor) -> Tensor:
        """Channels of the output of the layer as it is."""
        return self.output.index_select(channel_dim(self.layer, self.output), index)


def _along(call: _Call, sides: tuple[Side, ...]) -> list[tuple[Axis, Side]] | None:
    """The axes that have to be exchanged with `sides`, all that can be; None if no choice of them works."""
    layer = call.layer
    blocks = width(layer, sides[-1]) // block(layer, sides[-1])
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
    index = {side: _spread(order, width(layer, side)) for side in sides}
    candidates = [
        (axis, side) for axis, size in _axes(layer) for side in sides[-1:] + sides[:-1] if size == len(index[side])
    ]
    for chosen in _choices(candidates):
        changed = copied(layer)
        for name, dim, side in sliced_tensors(layer):
            if side in sides:
                _reorder(changed, name, dim, index[side])
        done: set[tuple[int, int]] = set()
        for axis, side in chosen:
            for name, dim in _tensors(changed, axis):
                key = (id(_tensor(changed, name)), dim)
                if key not in done:
                    _reorder(changed, name, dim, index[side])
                done.add(key)
        reads = sides[0] if "in" in sides or not is_mixing(layer) else None
        try:
            output = call.run(changed, index[reads] if reads is not None else None)
        except Exception:  # a user's forward may raise anything when given other values
            continue
        expected = call.selected(index["out"]) if "out" in sides else call.output
        if _alike(output, expected):
            return chosen
    return None


def _narrowed(call: _Call, sides: tuple[Side, ...], along: Sequence[tuple[Axis, Side]]) -> str | None:
    """Why the layer cannot be narrowed on `sides`, although its channels can be exchanged; else None."""
    layer = call.layer
    blocks = width(layer, sides[-1]) // block(layer, sides[-1])
    some = torch.randperm(blocks, generator=torch.Generator().manual_seed(2))[: (blocks + 1) // 2].sort().values
    kept = {side: _spread(some, width(layer, side), blocks) for side in sides}
    keep: Keep = {"": {str(side): left for side, left in kept.items()}}
    for (owner, axis), side in along:
        keep.setdefault(owner, {})[axis] = kept[side]
    reads = sides[0] if "in" in sides or not is_mixing(layer) else None
    name = type(layer).__name__
    try:
        output = call.run(pruned(layer, keep), kept[reads] if reads is not None else None)
    except Exception as error:  # as above
        text = str(error).splitlines()[0] if str(error) else ""
        return f"the forward of {name} does not run with fewer channels ({type(error).__name__}: {text[:160]})"
    # inputs may be averaged over, as by a standardised weight; a filter that depends on other filters is another one
    if sides == ("out",) and is_mixing(layer) and not _alike(output, call.selected(kept["out"])):
        if has_derived_weight(layer):
            return _places(layer)
        return f"in {name}, what one filter computes depends on the others (a normalisation over the whole weight)"
    return None


def _places(layer: nn.Module) -> str:
    if has_derived_weight(layer):
        return (
            f"the weight of {type(layer).__name__} is parametrized in a way that cannot be narrowed: remove the "
            "parametrization first (torch.nn.utils.parametrize.remove_parametrizations, remove_spectral_norm)"
        )
    return (
        f"the forward of {type(layer).__name__} is its own, and what it does with a channel depends on the channel's "
        "place, or on a tensor that is no parameter or buffer with one entry for each"
    )


def _axes(layer: nn.Module) -> Iterator[tuple[Axis, int]]:
    """Axes of what `layer` has beyond the tensors of its type: (its own or its children's axis, size)."""
    usual = {name for name, _, _ in sliced_tensors(layer)}
    for path, module in layer.named_modules():
        if path and (is_mixing(module) or is_following(module)):
            for side in dict.fromkeys(side for _, _, side in sliced_tensors(module)):
                if block(module, side) == 1 and getattr(module, "groups", 1) == 1:
                    yield (path, side), width(module, side)
            continue
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and (path or name not in usual):
                for dim, size in enumerate(tensor.shape):
                    yield (f"{path}.{name}" if path else name, str(dim)), size


def _choices(candidates: list[tuple[Axis, Side]]) -> Iterator[list[tuple[Axis, Side]]]:
    """Subsets, the largest first: what does not matter goes along."""
    few = len(candidates) <= _MOST_TENSORS
    for size in range(len(candidates), -1, -1) if few else (len(candidates), 1, 0):
        for chosen in itertools.combinations(candidates, size):
            if len({axis for axis, _ in chosen}) == len(chosen):
                yield list(chosen)


def _tensors(layer: nn.Module, axis: Axis) -> list[tuple[str, int]]:
    """Names and dimensions of what is cut with an axis that `_axes` gives."""
    owner, at = axis
    if at not in ("in", "out"):
        return [(owner, int(at))]
    child = layer.get_submodule(owner)
    return [(f"{owner}.{name}", dim) for name, dim, side in sliced_tensors(child) if side == at]


def _tensor(layer: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Any = getattr(layer.get_submodule(path), last)
    assert isinstance(tensor, Tensor)
    return tensor


@torch.no_grad()
def _reorder(layer: nn.Module, name: str, dim: int, index: Tensor) -> None:
    tensor = _tensor(layer, name)
    tensor.copy_(tensor.index_select(dim, index))


def _spread(blocks: Tensor, channels: int, of: int | None = None) -> Tensor:
    """Indices of the channels in `blocks`, of which there are `of` in all, default as many as are given."""
    size = channels // (of or len(blocks))
    return (blocks[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _lively(layer: nn.Module) -> nn.Module:
    """A copy whose tensors differ from entry to entry: a gain of ones goes along with any channels."""
    lively = copied(layer)
    generator = torch.Generator().manual_seed(0)
    parameters = {id(p) for p in lively.parameters()}
    for tensor in itertools.chain(lively.parameters(), lively.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator).to(tensor))
            if id(tensor) in parameters and tensor.numel() and not bool(tensor.any()):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))
    return lively


def _alike(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    off = (output.double() - expected.double()).norm()
    return bool(off <= 1e-3 * expected.double().norm())
