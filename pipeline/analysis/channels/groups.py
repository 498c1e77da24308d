"""Channels that can only be removed together, and what the layers cost without some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .flow import Axis, Call
from .surgery import Keep


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
