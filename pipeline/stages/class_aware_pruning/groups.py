"""Channels that can only be removed together, and the layers whose channels must stay, each with the reason."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StageError
from .axes import channel_dim, is_convolution, is_depthwise, is_following, is_mixing
from .coupling import Union, joined
from .equivalence import difference, failures, probe
from .surgery import Keep
from .tracing import OUTPUT, Axis, Call, Flow, hooked, plain_eval, trace

_MOST_TRIES = 8
"""Combinations of written numbers that are tried for one group."""


@dataclass(frozen=True)
class ChannelGroup:
    """Units of one kind: each unit is a set of channels of several layers that stay or go together.

    A unit is one filter of a plain layer; with coupled layers (residual streams, gates) one filter of each; with a
    grouped convolution a whole group of filters.

    Attributes:
        name: path of the first producer that runs, with a number where it has channels of several kinds.
        producers: the mixing layers whose filters these are, in order of execution.
        members: per axis the channels of every unit, int64 [units, channels of a unit]; producers have ``out``, readers
            ``in``, layers in between both or ``out``, and modules that write the number down the attribute's name.
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
    lively = probe(model)
    channels = Channels(tuple(groups), refused, flow.widths, flow.calls)
    wrong = failures(lively, inputs, channels.keep, _odd_halves(channels))
    counted = _with_counts(lively, inputs, channels, [g for g in groups if g.name in wrong])
    if counted is not channels:
        channels = counted
        wrong = failures(lively, inputs, channels.keep, _odd_halves(channels))
    for group in channels.groups:
        if group.name in wrong:
            refused.update(dict.fromkeys(group.producers, wrong[group.name]))
    for group in channels.groups:
        if group.name not in wrong:
            for path in group.producers:
                refused.pop(path, None)
    return replace(channels, groups=tuple(g for g in channels.groups if g.name not in wrong), refused=refused)


def _with_counts(
    model: nn.Module, inputs: tuple[Tensor, ...], channels: Channels, groups: Sequence[ChannelGroup]
) -> Channels:
    """`channels` with those of `groups` repaired that only a written number kept from being narrowed.

    Modules often write down how many heads or channels they have, and shape their tensors by it. Such a number goes
    along with the channels if the model then computes what the masked one computes. Residual streams, whose number is
    written everywhere, are left as they are.
    """
    for group in groups:
        taken = {axis for other in channels.groups for axis in other.members}
        counts = {a: n for a, n in _counts(model, group).items() if a not in taken} if not group.residual else {}
        tries = (some for size in range(1, len(counts) + 1) for some in itertools.combinations(counts, size))
        for some in itertools.islice(tries, _MOST_TRIES):
            more = {axis: torch.arange(counts[axis]).view(group.units, -1) for axis in some}
            whole = replace(group, members={**group.members, **more})
            others = tuple(whole if g.name == group.name else g for g in channels.groups)
            trial = replace(channels, groups=others, widths={**channels.widths, **{a: counts[a] for a in some}})
            if difference(model, inputs, trial.keep({group.name: _odd_half(group, 0)})) is None:
                channels = trial
                break
    return channels


def _counts(model: nn.Module, group: ChannelGroup) -> dict[Axis, int]:
    """Integers of the modules around a group's layers that may be its number of units or channels, by (path, name)."""
    modules = dict(model.named_modules())
    paths = [axis[0] for axis in group.members if axis[0] in modules and is_mixing(modules[axis[0]])]
    parts = [path.split(".")[:-1] for path in paths]
    levels = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    shared = len(list(levels))
    around = dict.fromkeys(".".join(p[:depth]) for p in parts for depth in range(shared, len(p) + 1))
    wide = {group.units, *(group.members[(path, "out")].numel() for path in group.producers)}
    return {
        (path, name): value
        for path in around
        for name, value in vars(modules[path]).items()
        if type(value) is int and value in wide and not is_mixing(modules[path]) and not is_following(modules[path])
    }


def _odd_halves(channels: Channels) -> dict[str, Tensor]:
    return {group.name: _odd_half(group, number) for number, group in enumerate(channels.groups)}


def _odd_half(group: ChannelGroup, seed: int) -> Tensor:
    """About half of the units, irregular on purpose: a regular choice could pass where others do not."""
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, (group.units + 1) // 2 - (group.units > 6))].sort().values


def find_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Channels:
    """The columns of the model's output as the units of one group, in order: one per class.

    Args:
        model: unchanged afterwards; returns logits [N, classes].
        inputs: one row, positional.

    Raises:
        StageError: the model does not run on the inputs, or its columns cannot be told apart.
    """
    flow = trace(model, inputs)
    if OUTPUT not in flow.widths:
        raise StageError("the model returns no tensor [N, classes], so it cannot be specialised: return the logits")
    union, frozen = joined(model, flow, outputs=False)
    reasons = {union.root(slot): reason for slot, reason in frozen.items()}
    roots = [union.root(union.start[OUTPUT] + column) for column in range(flow.widths[OUTPUT])]
    found: dict[int, dict[Axis, list[int]]] = {root: {} for root in roots}
    for axis, size in flow.widths.items():
        for channel in range(size if axis != OUTPUT else 0):
            unit = found.get(union.root(union.start[axis] + channel))
            if unit is not None:
                unit.setdefault(axis, []).append(channel)
    first = found[roots[0]]
    alike = all(
        {a: len(c) for a, c in unit.items()} == {a: len(c) for a, c in first.items()} for unit in found.values()
    )
    makers = tuple(path for path in flow.calls if (path, "out") in first)
    why = next((reasons[root] for root in roots if root in reasons), None)
    if why is None and (len(found) < len(roots) or not alike or not makers):
        why = "its columns are not one output channel each of the layers that make them"
    if why is not None:
        raise StageError(
            f"the model cannot be specialised to some of its classes: {why}. Return the logits of the last layer as "
            "they are; softmax and the like belong into the loss"
        )
    members = {axis: torch.tensor([found[root][axis] for root in roots]) for axis in sorted(first)}
    return Channels((ChannelGroup("output", makers, members),), {}, flow.widths, flow.calls)


def _components(model: nn.Module, flow: Flow) -> tuple[list[ChannelGroup], dict[str, str]]:
    union, frozen = joined(model, flow, outputs=True)
    reasons: dict[int, str] = {}
    for slot, reason in frozen.items():
        reasons.setdefault(union.root(slot), reason)
    return _sorted_into_groups(model, flow, union, reasons)


def _sorted_into_groups(
    model: nn.Module, flow: Flow, union: Union, reasons: Mapping[int, str]
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
        if len(both) and axis != OUTPUT and is_mixing(modules[axis[0]]):
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
