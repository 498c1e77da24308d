"""Removes channels from a model, or masks them; replayable from JSON, without data, tracing or randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgewright.models.layers.channel_norm import ChannelNorm
from edgewright.models.sources.module_state import copied

from ...errors import CheckpointError
from ...stage import Json
from .axes import (
    Side,
    channel_dim,
    has_own_forward,
    has_statistics_over_channels,
    is_convolution,
    narrowed_attributes,
    sliced_tensors,
)

Keep: TypeAlias = dict[str, dict[str, Tensor]]
"""What stays: layer path -> ``in`` | ``out`` -> int64 indices, ascending; for a plain parameter or buffer: its name ->
dimension as text -> indices; for an integer that a module writes down: path of the module -> attribute -> as many
indices as it becomes. Axes that are not named stay whole. Indices refer to the model the cut starts from."""


def prune(model: nn.Module, keep: Keep, attributes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Narrows `model` in place; parameters shared by several modules stay shared.

    Args:
        model: any module that has the layers named in `keep`.
        keep: see `Keep`.
        attributes: default `changed_attributes`.

    Raises:
        CheckpointError: `keep` does not belong to this model.
    """
    modules = dict(model.named_modules())
    cuts: dict[int, dict[int, Tensor]] = {}
    for owner, axes in keep.items():
        path, _, name = owner.rpartition(".")
        if owner in modules:
            for tensor_name, dim, side in sliced_tensors(modules[owner]):
                if side in axes:
                    tensor = _tensor_of(modules[owner], tensor_name)
                    _note(cuts, tensor, dim, axes[side], f"{owner}.{tensor_name}")
        elif _is_tensor(modules, owner):
            for dim_text, kept in axes.items():
                _note(cuts, _tensor_of(modules[path], name), int(dim_text), kept, owner)
        else:
            raise CheckpointError(
                f"the edit narrows {owner!r}, which this model does not have: was it made for another?"
            )
    attributes = changed_attributes(model, keep) if attributes is None else attributes
    _slice(model, cuts)
    _refresh(modules, keep)
    set_attributes(model, attributes)


def changed_attributes(model: nn.Module, keep: Keep) -> dict[str, dict[str, Any]]:
    """The attributes (``out_channels`` and the like) that `keep` changes, by layer path; JSON-able."""
    modules = dict(model.named_modules())
    sides: tuple[Side, Side] = ("in", "out")
    changed: dict[str, dict[str, Any]] = {}
    for owner, axes in sorted(keep.items()):
        if owner in modules:
            found = {side: len(axes[side]) for side in sides if side in axes}
            changed[owner] = dict(narrowed_attributes(modules[owner], found)) if found else {}
            # numbers that a module writes down: heads, widths
            changed[owner].update({name: len(kept) for name, kept in axes.items() if name not in sides})
        elif isinstance(modules.get(owner.rpartition(".")[0]), nn.Embedding) and "1" in axes:
            changed[owner.rpartition(".")[0]] = {"embedding_dim": len(axes["1"])}
    return changed


def pruned(model: nn.Module, keep: Keep) -> nn.Module:
    """A narrowed copy; see `prune`."""
    small = copied(model)
    prune(small, keep)
    return small


def masked(model: nn.Module, keep: Keep) -> nn.Module:
    """A copy of full width that computes what `pruned` computes.

    Removed inputs of mixing layers get zero weights; normalisations over channels count only the kept ones. A layer
    with a forward of its own may do either, so it is narrowed, reads the kept channels, and gives zeros in the others.

    Raises:
        ValueError: `keep` names what the model does not have, such as the parts of an attention layer that is closed.
    """
    dense = copied(model)
    modules = dict(dense.named_modules())
    own = [path for path in keep if path in modules and has_own_forward(modules[path])]
    for owner, axes in keep.items():
        module = modules.get(owner)
        if module is None and not _is_tensor(modules, owner):
            raise ValueError(f"the model has no {owner!r}: attention layers have to be opened as the stage opened them")
        if module is None or any(owner.startswith(f"{path}.") for path in own):
            continue
        if owner in own:
            if "in" in axes or has_statistics_over_channels(module):
                inside = {
                    path[len(owner) + 1 :]: cut for path, cut in keep.items() if f"{path}.".startswith(f"{owner}.")
                }
                module.register_forward_hook(_by_narrowed(pruned(module, inside), axes), with_kwargs=True)
        elif isinstance(module, ChannelNorm):
            module.register_forward_hook(_by_narrowed(pruned(module, {"": axes}), axes), with_kwargs=True)
        elif has_statistics_over_channels(module):
            module.register_forward_hook(_normalise_kept(axes["out"]))
        elif "in" in axes and (not is_convolution(module) or getattr(module, "groups", 1) == 1):
            weight = _tensor_of(module, "weight")
            dim = next(d for name, d, side in sliced_tensors(module) if name == "weight" and side == "in")
            gone = torch.ones(weight.shape[dim], dtype=torch.bool)
            gone[axes["in"]] = False
            with torch.no_grad():
                weight.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return dense


def compose(first: Keep, second: Keep) -> Keep:
    """The one cut that does the same as `first` (of the original model) and then `second` (of what `first` left)."""
    result: Keep = {owner: dict(axes) for owner, axes in first.items()}
    for owner, axes in second.items():
        into = result.setdefault(owner, {})
        for axis, kept in axes.items():
            into[axis] = into[axis][kept] if axis in into else kept
    return result


def to_json(keep: Keep) -> Json:
    """`keep` with indices as half-open runs ``[[0, 3], [5, 6]]``, which stay short where a flattened map was cut."""
    return {owner: {axis: _runs(kept) for axis, kept in sorted(axes.items())} for owner, axes in sorted(keep.items())}


def from_json(data: Json) -> Keep:
    """The inverse of `to_json`."""
    return {
        owner: {
            axis: torch.cat([torch.arange(start, stop) for start, stop in runs] or [torch.zeros(0, dtype=torch.int64)])
            for axis, runs in axes.items()
        }
        for owner, axes in data.items()
    }


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets integer attributes of layers (``out_channels`` and the like); lists become tuples."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)


def _is_tensor(modules: Mapping[str, nn.Module], owner: str) -> bool:
    """Whether `owner` names a parameter or a buffer."""
    path, _, name = owner.rpartition(".")
    return path in modules and (
        modules[path]._parameters.get(name) is not None or modules[path]._buffers.get(name) is not None
    )


def _tensor_of(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _note(cuts: dict[int, dict[int, Tensor]], tensor: Tensor, dim: int, kept: Tensor, name: str) -> None:
    if dim >= tensor.dim() or (len(kept) and int(kept.max()) >= tensor.shape[dim]):
        raise CheckpointError(
            f"the edit keeps channel {int(kept.max())} of {name!r}, which has shape {list(tensor.shape)}: "
            "it was made for another model"
        )
    before = cuts.setdefault(id(tensor), {}).setdefault(dim, kept)
    if not torch.equal(before, kept):
        raise CheckpointError(f"the edit cuts {name!r}, which several layers share, in two ways")


def _slice(model: nn.Module, cuts: Mapping[int, Mapping[int, Tensor]]) -> None:
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or id(tensor) not in cuts:
                    continue
                # keyed by identity and kept alive by the old model until the loop ends, so ids cannot repeat
                if id(tensor) not in replaced:
                    replaced[id(tensor)] = _cut(tensor, cuts[id(tensor)])
                new: Any = replaced[id(tensor)]
                table[name] = new


def _refresh(modules: Mapping[str, nn.Module], keep: Keep) -> None:
    """Narrows weights that the next forward computes anew, as old ways of weight norm do; until then they are read."""
    for owner, axes in keep.items():
        module = modules.get(owner)
        if module is not None and isinstance(vars(module).get("weight"), Tensor):
            for name, dim, side in sliced_tensors(module, derived=True):
                if name == "weight" and side in axes:
                    tensor = _tensor_of(module, name).detach()
                    module.weight = tensor.index_select(dim, axes[side].to(tensor.device))


def _cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    value = tensor.detach()
    for dim, kept in dims.items():
        value = value.index_select(dim, kept.to(value.device))
    value = value.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _by_narrowed(small: nn.Module, axes: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        kept = axes.get("in" if "in" in axes else "out")
        x: Tensor = args[0] if args else kwargs["input"]
        if kept is not None:
            x = x.index_select(channel_dim(module, x), kept.to(x.device))
        y: Tensor = small(x, *args[1:], **kwargs) if args else small(**{**kwargs, "input": x})
        if "out" not in axes:
            return y
        dim = channel_dim(module, output)
        return torch.zeros_like(output).index_copy(dim, axes["out"].to(output.device), y)

    return hook


def _normalise_kept(kept: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        dim = channel_dim(module, output)
        index = kept.to(output.device)
        x = inputs[0].index_select(dim, index)
        weight = None if module.weight is None else module.weight[index]
        bias = None if getattr(module, "bias", None) is None else module.bias[index]
        if isinstance(module, nn.GroupNorm):
            y = nn.functional.group_norm(x, 1, weight, bias, module.eps)
        elif isinstance(module, nn.RMSNorm):
            y = nn.functional.rms_norm(x.movedim(dim, -1), (len(kept),), weight, module.eps).movedim(-1, dim)
        else:
            y = nn.functional.layer_norm(x.movedim(dim, -1), (len(kept),), weight, bias, module.eps).movedim(-1, dim)
        return torch.zeros_like(output).index_copy(dim, index, y)

    return hook


def _runs(kept: Tensor) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in kept.tolist():
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs
