"""Groups that only the code around them keeps from being narrowed: numbers written down, widths that must be equal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .axes import is_following, is_mixing
from .equivalence import difference
from .flow import Axis
from .groups import ChannelGroup, Channels

_MOST_TRIES = 8
"""Combinations that are tried for one group."""
_MOST_MERGES = 24
"""Joins that are tried for one model; where channels are shuffled, most groups fail and none of the joins helps."""


def odd_half(group: ChannelGroup, seed: int, fewer: int = 0) -> Tensor:
    """About half of the units, irregular on purpose: a regular choice could pass where others do not."""
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, (group.units + 1) // 2 - (group.units > 6) - fewer)].sort().values


def with_counts(
    model: nn.Module, inputs: tuple[Tensor, ...], channels: Channels, groups: Sequence[ChannelGroup]
) -> Channels:
    """`channels` with those of `groups` repaired that only a written number kept from being narrowed.

    Modules often write down how many heads or channels they have, and shape their tensors by it. Such a number goes
    along with the channels if the model then computes what the masked one computes, and so does a buffer of integers
    or booleans with an entry for each, which no NaN can be followed through. Residual streams, whose number is written
    everywhere, are left as they are.
    """
    for group in groups:
        taken = {axis for other in channels.groups for axis in other.members}
        counts = {a: n for a, n in _counts(model, group).items() if a not in taken} if not group.residual else {}
        along = {axis: (n, torch.arange(n).view(group.units, -1)) for axis, n in counts.items()}
        along = {**_lists(model, channels, group), **along}
        tries = (some for size in range(1, len(along) + 1) for some in itertools.combinations(along, size))
        for some in itertools.islice(tries, _MOST_TRIES):
            whole = replace(group, members={**group.members, **{axis: along[axis][1] for axis in some}})
            others = tuple(whole if g.name == group.name else g for g in channels.groups)
            trial = replace(channels, groups=others, widths={**channels.widths, **{a: along[a][0] for a in some}})
            if difference(model, inputs, trial.keep({group.name: odd_half(group, 0)})) is None:
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


def _lists(model: nn.Module, channels: Channels, group: ChannelGroup) -> dict[Axis, tuple[int, Tensor]]:
    """Axes of buffers without NaN that are as long as a layer of the group is wide, and the entries of each unit."""
    makers = {channels.widths[(path, "out")]: group.members[(path, "out")] for path in group.producers}
    return {
        (f"{path}.{name}" if path else name, str(dim)): (size, makers[size])
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None and not tensor.is_floating_point()
        for dim, size in enumerate(tensor.shape)
        if size in makers
    }


def merge_partners(
    model: nn.Module, inputs: tuple[Tensor, ...], channels: Channels, groups: Sequence[ChannelGroup]
) -> Channels:
    """`channels` with those of `groups` joined, unit by unit, that only run while they are equally wide.

    So it is with the halves that `chunk` makes of one layer's channels, and with what is stacked.
    """
    gone: set[str] = set()
    left = _MOST_MERGES
    for group in groups:
        if group.name in gone:
            continue
        for partners in itertools.islice(_partners(group, [g for g in groups if g.name not in gone]), left):
            left -= 1
            whole = _joined([group, *partners])
            names = {partner.name for partner in partners}
            others = tuple(whole if g.name == group.name else g for g in channels.groups if g.name not in names)
            trial = replace(channels, groups=others)
            if difference(model, inputs, trial.keep({whole.name: odd_half(whole, 0)})) is None:
                channels = trial
                gone |= {group.name, *names}
                break
    return channels


def _partners(group: ChannelGroup, groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """What may have to be as wide as `group`: what shares a layer with it, then any other one of as many units."""
    alike = [g for g in groups if g.units == group.units > 1 and g.name != group.name]
    near = [g for g in alike if g.members.keys() & group.members.keys()]
    tries = ([near] if len(near) > 1 else []) + [[g] for g in near] + [[g] for g in alike if g not in near]
    yield from tries[:_MOST_TRIES]


def _joined(groups: Sequence[ChannelGroup]) -> ChannelGroup:
    members: dict[Axis, list[Tensor]] = {}
    for group in groups:
        for axis, rows in group.members.items():
            members.setdefault(axis, []).append(rows)
    producers = tuple(dict.fromkeys(path for group in groups for path in group.producers))
    return replace(
        groups[0],
        producers=producers,
        members={axis: torch.cat(rows, dim=1).sort(dim=1).values for axis, rows in sorted(members.items())},
        residual=any(group.residual for group in groups),
    )
