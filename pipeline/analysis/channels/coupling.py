"""Which channels can only go together, and which have to stay: what `tracing` saw, as one partition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import nn

from .axes import Side, block, is_convolution, is_following, is_mixing, sliced_tensors, width
from .flow import OUTPUT, Axis, Flow


class Union:
    """Union-find over the channels of all axes."""

    def __init__(self, widths: Mapping[Axis, int]) -> None:
        self.start: dict[Axis, int] = {}
        total = 0
        for axis, size in widths.items():
            self.start[axis] = total
            total += size
        self.parent = list(range(total))

    def root(self, slot: int) -> int:
        """The slot that stands for all that are joined with `slot`."""
        parent = self.parent
        while parent[slot] != slot:
            parent[slot] = parent[parent[slot]]
            slot = parent[slot]
        return slot

    def join(self, a: Axis, i: int, b: Axis, j: int) -> None:
        """Joins channel `i` of axis `a` with channel `j` of axis `b`."""
        one, other = self.root(self.start[a] + i), self.root(self.start[b] + j)
        if one != other:
            self.parent[max(one, other)] = min(one, other)


def joined(model: nn.Module, flow: Flow, outputs: bool) -> tuple[Union, dict[int, str]]:
    """All channels, joined where they can only go together, and slots that have to stay, with the reason."""
    union = Union(flow.widths)
    for source, readers in flow.feeds.items():
        for reader, numbers in readers.items():
            for channel in (numbers >= 0).nonzero().flatten().tolist():
                union.join(source, int(numbers[channel]), reader, channel)
    frozen: dict[int, str] = {}
    for axis, reason in _fixed_axes(model, flow, outputs):
        for channel in range(flow.widths[axis]):
            frozen.setdefault(union.start[axis] + channel, reason)
    for reader, several in itertools.chain.from_iterable(places.items() for places in flow.mixed_at.values()):
        for channel in several.nonzero().flatten().tolist():
            frozen.setdefault(union.start[reader] + channel, _mixed_reason(reader[0]))
    for source, blocks in flow.blocks.items():
        for members, arrived in blocks:
            first, *rest = members.nonzero().flatten().tolist()
            for channel in rest:
                union.join(source, first, source, channel)
            for reader, there in arrived.items():
                for channel in there.nonzero().flatten().tolist():
                    union.join(source, first, reader, channel)
    for one, other in _ties(model, flow):
        for channel in range(min(flow.widths[one], flow.widths[other])):
            union.join(one, channel, other, channel)
    for path, module in model.named_modules():
        _join_blocks(union, flow, path, module)
    return union, frozen


def _mixed_reason(path: str) -> str:
    if path == OUTPUT[0]:
        return "its channels are mixed before they are returned"
    return (
        f"its channels are mixed before they reach {path!r}: attention, a normalisation of the model's own, or another "
        "operation over channels"
    )


def _fixed_axes(model: nn.Module, flow: Flow, outputs: bool) -> Iterator[tuple[Axis, str]]:
    modules = dict(model.named_modules())
    for axis in flow.outputs if outputs else ():
        yield axis, "it produces the model's output"
    for path in sorted(flow.training_only) if outputs else ():
        yield (path, "out"), "it runs in training only (an auxiliary head), where nothing is to be gained"
    for axis, reader in flow.mixed.items():
        if axis[0] in modules:
            yield axis, _mixed_reason(reader)
    for path in flow.calls:
        axis = (path, "out")
        reads_none = axis not in flow.outputs and axis not in flow.along and not flow.feeds.get(axis)
        if is_mixing(modules[path]) and reads_none:
            yield axis, flow.decides.get(axis, "no layer that can be narrowed reads it")
    for axis, reason in flow.stuck.items():
        yield axis, reason if axis[1] == "out" else f"{axis[0]!r} reads it: {reason}"
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
    """Axes that go along with a layer's, and axes of different layers that cut one dimension of one shared tensor."""
    yield from flow.along.items()
    first: dict[tuple[int, int], Axis] = {}
    for path, module in model.named_modules():
        if is_mixing(module) or is_following(module):
            for name, dim, side in sliced_tensors(module):
                axis: Axis = (path, side)
                if axis in flow.widths:
                    yield first.setdefault((id(getattr(module, name)), dim), axis), axis


def _join_blocks(union: Union, flow: Flow, path: str, module: nn.Module) -> None:
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
