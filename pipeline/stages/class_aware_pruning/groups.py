"""Channels that can only be removed together, and the layers whose channels must stay, each with the reason."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .axes import Side, block, channel_dim, is_convolution, is_depthwise, is_following, is_mixing, sliced_tensors, width
from .equivalence import failures, probe
from .surgery import Keep
from .tracing import Axis, Call, Flow, hooked, plain_eval, trace


@dataclass(frozen=True)
class ChannelGroup:
    """Units of one kind: each unit is a set of channels of several layers that stay or go together.

    A unit is one filter of a plain layer; with coupled layers (residual streams, gates) one filter of each; with a
    grouped convolution a whole group of filters.

    Attributes:
        name: path of the first producer that runs, with a number where it has channels of several kinds.
        producers: the mixing layers whose filters these are, in order of execution.
        members: per axis the channels of every unit, int64 [units, channels of a unit]; producers have ``out``, readers
            ``in``, layers in between both or ``out``.
        residual: several producers are added, so that these are channels of a stream.
    """

    name: str
    producers: tuple[str, ...]
    members: Mapping[Axis, Tensor]
    residual: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.members[(self.producers[0], "out")])

    @property
    def unit_width(self) -> int:
        """Most channels that one unit has in one producer."""
        return max(self.members[(path, "out")].shape[1] for path in self.producers)


@dataclass(frozen=True)
class Channels:
    """What can be pruned.

    Attributes:
        groups: disjoint, in order of execution.
        refused: path of every linear layer and convolution that keeps its output channels -> the reason.
        widths: channels per axis.
        calls: cost of every layer that ran.
    """

    groups: tuple[ChannelGroup, ...]
    refused: Mapping[str, str]
    widths: Mapping[Axis, int]
    calls: Mapping[str, Call]

    def keep(self, kept: Mapping[str, Tensor]) -> Keep:
        """The cut that leaves the units `kept` (group name -> indices of units; other groups stay whole)."""
        gone: dict[Axis, list[Tensor]] = {}
        for group in self.groups:
            if group.name not in kept or len(kept[group.name]) == group.units:
                continue
            stays = torch.zeros(group.units, dtype=torch.bool)
            stays[kept[group.name]] = True
            for axis, channels in group.members.items():
                gone.setdefault(axis, []).append(channels[~stays].flatten())
        result: Keep = {}
        for axis, removed in gone.items():
            left = torch.ones(self.widths[axis], dtype=torch.bool)
            left[torch.cat(removed)] = False
            result.setdefault(axis[0], {})[axis[1]] = left.nonzero().flatten()
        return result

    def narrowed(self, kept: Mapping[str, Tensor]) -> Channels:
        """The same for the model after the cut ``keep(kept)``, without looking at it."""
        keep = self.keep(kept)
        places: dict[Axis, Tensor] = {}
        for owner, axes in keep.items():
            for axis, left in axes.items():
                place = torch.full((self.widths[(owner, axis)],), -1, dtype=torch.int64)
                place[left] = torch.arange(len(left))
                places[(owner, axis)] = place
        groups = []
        for group in self.groups:
            rows = kept.get(group.name, torch.arange(group.units))
            members = {a: places[a][c[rows]] if a in places else c[rows] for a, c in group.members.items()}
            groups.append(replace(group, members=members))
        widths = {a: len(keep[a[0]][a[1]]) if a in places else size for a, size in self.widths.items()}
        macs = self.macs_per_layer({g.name: g.units - len(kept[g.name]) for g in self.groups if g.name in kept})
        calls = {path: replace(call, macs=macs[path]) for path, call in self.calls.items()}
        return Channels(tuple(groups), self.refused, widths, calls)

    def macs_per_layer(self, removed: Mapping[str, int]) -> dict[str, int]:
        """Multiply-accumulates of one row in every layer, after removing so many units of each group."""
        less: dict[Axis, int] = {}
        for group in self.groups:
            if removed.get(group.name):
                for axis, channels in group.members.items():
                    less[axis] = less.get(axis, 0) + removed[group.name] * channels.shape[1]
        macs = {}
        for path, call in self.calls.items():
            into, out = (path, "in"), (path, "out")
            macs[path] = call.macs * (self.widths[out] - less.get(out, 0)) // self.widths[out]
            if call.dense:
                macs[path] = macs[path] * (self.widths[into] - less.get(into, 0)) // self.widths[into]
        return macs

    def macs(self, removed: Mapping[str, int]) -> int:
        """Sum of `macs_per_layer`."""
        return sum(self.macs_per_layer(removed).values())


def find_channels(model: nn.Module, inputs: tuple[Tensor, ...], prune_residual: bool = False) -> Channels:
    """Finds every group of `model` that can be pruned, and proves it: narrowed must equal masked.

    Args:
        model: unchanged afterwards.
        inputs: one row, positional.
        prune_residual: take residual streams as well.

    Raises:
        StageError: the model does not run on the inputs.
    """
    flow = trace(model, inputs)
    found, refused = _components(model, flow)
    groups = []
    for group in found:
        if _is_residual(model, inputs, group, flow):
            if not prune_residual:
                text = "its channels are added to those of other layers (residual stream); see prune_residual"
                refused.update(dict.fromkeys(group.producers, text))
                continue
            group = ChannelGroup(group.name, group.producers, group.members, True)
        groups.append(group)
    channels = Channels(tuple(groups), refused, flow.widths, flow.calls)
    wrong = failures(probe(model), inputs, channels.keep, {g.name: _odd_half(g, i) for i, g in enumerate(groups)})
    for group in groups:
        if group.name in wrong:
            refused.update(dict.fromkeys(group.producers, wrong[group.name]))
    for group in groups:
        if group.name not in wrong:
            for path in group.producers:
                refused.pop(path, None)
    return Channels(tuple(g for g in groups if g.name not in wrong), refused, flow.widths, flow.calls)


def _odd_half(group: ChannelGroup, seed: int) -> Tensor:
    """About half of the units, irregular on purpose: a regular choice could pass where others do not."""
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, (group.units + 1) // 2 - (group.units > 6))].sort().values


class _Union:
    """Union-find over the channels of all axes."""

    def __init__(self, widths: Mapping[Axis, int]) -> None:
        self.start: dict[Axis, int] = {}
        total = 0
        for axis, size in widths.items():
            self.start[axis] = total
            total += size
        self.parent = list(range(total))

    def root(self, slot: int) -> int:
        parent = self.parent
        while parent[slot] != slot:
            parent[slot] = parent[parent[slot]]
            slot = parent[slot]
        return slot

    def join(self, a: Axis, i: int, b: Axis, j: int) -> None:
        one, other = self.root(self.start[a] + i), self.root(self.start[b] + j)
        if one != other:
            self.parent[max(one, other)] = min(one, other)


def _components(model: nn.Module, flow: Flow) -> tuple[list[ChannelGroup], dict[str, str]]:
    union = _Union(flow.widths)
    for source, readers in flow.feeds.items():
        for reader, numbers in readers.items():
            for channel in (numbers >= 0).nonzero().flatten().tolist():
                union.join(source, int(numbers[channel]), reader, channel)
    frozen: dict[int, str] = {}
    for axis, reason in _fixed_axes(model, flow):
        for channel in range(flow.widths[axis]):
            frozen.setdefault(union.start[axis] + channel, reason)
    for reader, several in flow.mixed_at.items():
        for channel in several.nonzero().flatten().tolist():
            frozen.setdefault(union.start[reader] + channel, _mixed_reason(reader[0]))
    for one, other in _ties(model, flow):
        for channel in range(min(flow.widths[one], flow.widths[other])):
            union.join(one, channel, other, channel)
    for path, module in model.named_modules():
        _join_blocks(union, flow, path, module)
    reasons: dict[int, str] = {}
    for slot, reason in frozen.items():
        reasons.setdefault(union.root(slot), reason)
    return _sorted_into_groups(model, flow, union, reasons)


def _mixed_reason(path: str) -> str:
    return (
        f"its channels are mixed before they reach {path!r}: attention, a normalisation of the model's own, or another "
        "operation over channels"
    )


def _fixed_axes(model: nn.Module, flow: Flow) -> Iterator[tuple[Axis, str]]:
    modules = dict(model.named_modules())
    for axis in flow.outputs:
        yield axis, "it produces the model's output"
    for axis, reader in flow.mixed.items():
        if axis[0] in modules:
            yield axis, _mixed_reason(reader)
    for path in flow.calls:
        axis = (path, "out")
        if is_mixing(modules[path]) and axis not in flow.outputs and not flow.feeds.get(axis):
            yield axis, "no layer that can be narrowed reads it"
    foreign: dict[int, str] = {}
    for path, module in modules.items():
        if not (is_mixing(module) or is_following(module)):
            foreign.update({id(p): path for p in module._parameters.values() if p is not None})
    for path, module in modules.items():
        if is_mixing(module) or is_following(module):
            for name, _, side in sliced_tensors(module):
                tensor = getattr(module, name)
                if id(tensor) in foreign and (path, side) in flow.widths:
                    yield (path, side), f"it shares {name!r} with {foreign[id(tensor)]!r}"


def _ties(model: nn.Module, flow: Flow) -> Iterator[tuple[Axis, Axis]]:
    """Axes of different layers that cut the same dimension of one shared tensor."""
    first: dict[tuple[int, int], Axis] = {}
    for path, module in model.named_modules():
        if is_mixing(module) or is_following(module):
            for name, dim, side in sliced_tensors(module):
                axis: Axis = (path, side)
                if axis in flow.widths:
                    yield first.setdefault((id(getattr(module, name)), dim), axis), axis


def _join_blocks(union: _Union, flow: Flow, path: str, module: nn.Module) -> None:
    """Couples the channels of one group of a grouped layer, and input and output of convolutions by group."""
    sides: tuple[Side, ...] = ("in", "out") if is_convolution(module) and getattr(module, "groups", 1) > 1 else ("out",)
    if not (is_mixing(module) or is_following(module)) or any((path, side) not in flow.widths for side in sides):
        return
    for side in sides:
        size = block(module, side)
        for channel in range(width(module, side) if size > 1 else 0):
            union.join((path, side), channel, (path, side), channel // size * size)
    if len(sides) == 2:
        for g in range(width(module, "in") // block(module, "in")):
            union.join((path, "in"), g * block(module, "in"), (path, "out"), g * block(module, "out"))


def _sorted_into_groups(
    model: nn.Module, flow: Flow, union: _Union, reasons: Mapping[int, str]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    units: dict[int, dict[Axis, list[int]]] = {}
    for axis, size in flow.widths.items():
        for channel in range(size):
            units.setdefault(union.root(union.start[axis] + channel), {}).setdefault(axis, []).append(channel)
    modules = dict(model.named_modules())
    refused = _unusable(model, flow)
    kinds: dict[tuple[Any, ...], list[dict[Axis, list[int]]]] = {}
    order = {path: place for place, path in enumerate(flow.calls)}
    for root, unit in units.items():
        makers = sorted(
            (a for a in unit if a[1] == "out" and a[0] in order and is_mixing(modules[a[0]])), key=lambda a: order[a[0]]
        )
        if not makers:
            continue
        reason = reasons.get(root)
        if reason is None and not any(a[1] == "in" and is_mixing(modules[a[0]]) for a in unit if a[0] in modules):
            reason = "no layer that can be narrowed reads it"
        if reason is not None:
            for axis in makers:
                refused.setdefault(axis[0], reason)
            continue
        kinds.setdefault((tuple(makers), frozenset((a, len(c)) for a, c in unit.items())), []).append(unit)
    groups, names = [], dict[str, int]()
    for (makers, _), members in sorted(kinds.items(), key=lambda item: order[item[0][0][0][0]]):
        path = makers[0][0]
        names[path] = names.get(path, 0) + 1
        name = path if names[path] == 1 else f"{path}[{names[path]}]"
        members.sort(key=lambda unit: unit[makers[0]])
        table = {axis: torch.tensor([unit[axis] for unit in members]) for axis in sorted(members[0])}
        groups.append(ChannelGroup(name, tuple(a[0] for a in makers), table))
    return groups, refused


def _unusable(model: nn.Module, flow: Flow) -> dict[str, str]:
    refused = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_convolution(module):
            continue
        if not is_mixing(module) and not is_depthwise(module):
            refused[path] = "its weight is parametrized: remove the parametrization first"
        elif path in flow.opaque:
            refused[path] = "its forward is its own: channels are not where such a layer has them"
        elif path not in flow.calls:
            refused[path] = "the forward pass does not call it (its weight is read directly, or it is not used)"
    return refused


def _is_residual(model: nn.Module, inputs: tuple[Tensor, ...], group: ChannelGroup, flow: Flow) -> bool:
    """Whether two producers are added. A gate is not: with one factor at zero, the other has no influence.

    Producers of one position beside others of many (squeeze-and-excitation, conditioning vectors) are no streams.
    """
    spread = [path for path in group.producers if flow.calls[path].positions > 1]
    full = spread or list(group.producers)
    if len(full) < 2:
        return False
    # without shifts a zero stays zero on its way to the place where the two meet
    bare = copy.deepcopy(model)
    for module in bare.modules():
        if is_following(module) or is_mixing(module):
            for name in ("bias", "running_mean"):
                shift = getattr(module, name, None)
                if isinstance(shift, Tensor):
                    shift.detach().zero_()
    for one, other in itertools.combinations(full, 2):
        meet = _meeting(bare, flow, (one, "out"), (other, "out"))
        if meet and _influence(bare, inputs, one, other, meet) and _influence(bare, inputs, other, one, meet):
            return True
    return False


def _meeting(model: nn.Module, flow: Flow, one: Axis, other: Axis) -> dict[str, Tensor]:
    """The mixing layers that read both sources in the same channels, and these channels."""
    modules = dict(model.named_modules())
    meet: dict[str, Tensor] = {}
    for axis in flow.feeds[one].keys() & flow.feeds[other].keys():
        both = ((flow.feeds[one][axis] >= 0) & (flow.feeds[other][axis] >= 0)).nonzero().flatten()
        if len(both) and is_mixing(modules[axis[0]]):
            meet[axis[0]] = both
    return dict(sorted(meet.items()))


@torch.no_grad()
def _influence(
    model: nn.Module, inputs: tuple[Tensor, ...], silent: str, changed: str, readers: Mapping[str, Tensor]
) -> bool:
    """Whether channels of the readers depend on layer `changed` while layer `silent` gives zeros."""
    modules = dict(model.named_modules())

    def zeros(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def seen_with(seed: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)

        def note(path: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, args: Any) -> None:
                dim = channel_dim(module, args[0])
                seen.append(args[0].index_select(dim, readers[path].to(args[0].device)).clone())

            return hook

        handles = [modules[silent].register_forward_hook(zeros), modules[changed].register_forward_hook(noise)]
        handles += [modules[path].register_forward_pre_hook(note(path)) for path in readers]
        with plain_eval(model), hooked(handles):
            model(*inputs)
        return seen

    # a reader that runs before `changed` sees the same both times
    return any(not torch.equal(a, b) for a, b in zip(seen_with(0), seen_with(1), strict=True))
