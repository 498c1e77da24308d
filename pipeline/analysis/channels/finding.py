"""Finds what can be removed from a model, and proves it by running: narrowed must equal masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.models.sources.module_state import untouched

from ...errors import StageError
from .apart import Care, EndedError, looked_into
from .axes import is_convolution, is_mixing
from .coupling import Union, joined
from .equivalence import fails_in_training, failures, probe
from .flow import OF_ONE_TENSOR, OUTPUT, Axis, Columns, Flow
from .groups import ChannelGroup, Channels
from .repairs import merge_partners, odd_half, with_counts
from .residual import streams
from .tracing import trace


def find_channels(model: nn.Module, inputs: tuple[Tensor, ...], prune_residual: bool = False) -> Channels:
    """Finds every group of `model` that can be pruned, and proves it: narrowed must equal masked.

    Args:
        model: unchanged afterwards.
        inputs: one row, positional.
        prune_residual: take residual streams as well.

    Raises:
        StageError: the model does not run on the inputs.
    """
    with untouched(model):
        try:
            return looked_into(model, lambda care: _found(model, inputs, prune_residual, care))
        except EndedError as ended:
            reason = f"compiled code of another library {ended.how} while channels were followed, in {ended.place!r}"
            layers = (path for path, module in model.named_modules() if is_mixing(module))
            return Channels((), dict.fromkeys(layers, reason), {}, {}, foreign=True)


def _found(model: nn.Module, inputs: tuple[Tensor, ...], prune_residual: bool, care: Care) -> Channels:
    flow = trace(model, inputs, care)
    found, refused = _components(model, flow)
    several = {group.name for group in found if len(group.producers) > 1}
    added = streams(model, inputs, found, flow) if care.streams else several
    groups = [replace(group, residual=group.name in added) for group in found]
    if not prune_residual:
        text = "its channels are added to those of other layers (residual stream); see prune_residual"
        refused.update((path, text) for group in groups if group.residual for path in group.producers)
        groups = [group for group in groups if not group.residual]
    lively = probe(model)
    calls = {path: call for path, call in flow.calls.items() if path not in flow.training_only}
    channels, wrong = _proven(lively, inputs, Channels(tuple(groups), refused, flow.widths, calls, care.apart))
    if flow.training_only:
        wrong.update(_unfit_for_training(lively, inputs, channels, flow, wrong))
    wrong.update((g.name, "its channels go all together or not at all") for g in channels.groups if g.units == 1)
    good = tuple(group for group in channels.groups if group.name not in wrong)
    for group in channels.groups:
        if group.name in wrong:
            refused.update(dict.fromkeys(group.producers, wrong[group.name] + _decisions(group, flow)))
    for path in {path for group in good for path in group.producers}:
        refused.pop(path, None)
    return replace(channels, groups=good, refused=refused)


def _proven(model: nn.Module, inputs: tuple[Tensor, ...], channels: Channels) -> tuple[Channels, dict[str, str]]:
    """`channels` after repairs, and the groups that cannot be narrowed all the same, with the reason."""
    wrong = failures(model, inputs, channels.keep, _odd_halves(channels))
    for repaired in (with_counts, merge_partners):
        better = repaired(model, inputs, channels, [g for g in channels.groups if g.name in wrong])
        if better is not channels:
            channels = better
            wrong = failures(model, inputs, channels.keep, _odd_halves(channels))
    return channels, wrong


def _decisions(group: ChannelGroup, flow: Flow) -> str:
    """Says which readers of a group that cannot be narrowed decide something there, if any do."""
    for (path, _), reason in flow.decides.items():
        if (path, "in") in group.members:
            return f". {path!r} reads it, and {reason}"
    return ""


def _odd_halves(channels: Channels) -> dict[str, Tensor]:
    """Half of every group, of different sizes: code may count on two groups being equally wide."""
    seen: dict[int, int] = {}
    halves = {}
    for number, group in enumerate(channels.groups):
        place = seen[group.units] = seen.get(group.units, -1) + 1
        halves[group.name] = odd_half(group, number, place % max(1, group.units // 4))
    return halves


def _unfit_for_training(
    model: nn.Module, inputs: tuple[Tensor, ...], channels: Channels, flow: Flow, wrong: Mapping[str, str]
) -> dict[str, str]:
    """Groups that layers for training alone read, if these do not run on fewer of their channels."""
    readers = [
        g for g in channels.groups if g.name not in wrong and any(path in flow.training_only for path, _ in g.members)
    ]
    kept = {group.name: odd_half(group, number) for number, group in enumerate(readers)}
    reason = fails_in_training(model, inputs, channels.keep(kept)) if kept else None
    return {} if reason is None else dict.fromkeys(kept, reason)


def find_outputs(model: nn.Module, inputs: tuple[Tensor, ...], columns: Columns = OF_ONE_TENSOR) -> Channels:
    """The columns of the model's output as the units of one group, in order: one per class.

    Args:
        model: unchanged afterwards; returns logits [N, classes], or what `columns` says.
        inputs: one row, positional.
        columns: of the classes.

    Raises:
        StageError: the model does not run on the inputs, or its columns cannot be told apart.
    """
    with untouched(model):
        try:
            return looked_into(model, lambda care: _found_outputs(model, inputs, care, columns))
        except EndedError as ended:
            raise StageError(
                f"the model cannot be specialised to some of its classes: compiled code of another library {ended.how} "
                f"while its columns were followed, in {ended.place!r}"
            ) from ended


def _found_outputs(model: nn.Module, inputs: tuple[Tensor, ...], care: Care, columns: Columns) -> Channels:
    flow = trace(model, inputs, care, columns)
    if OUTPUT not in flow.widths:
        raise StageError(
            "the model returns no tensor with a column for each class, so it cannot be specialised: return the logits"
        )
    union, frozen = joined(model, flow, outputs=False)
    reasons = {union.root(slot): reason for slot, reason in frozen.items()}
    roots = [union.root(union.start[OUTPUT] + column) for column in range(columns.first, flow.widths[OUTPUT])]
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
            (a for a in unit if a[1] == "out" and a[0] in order and is_mixing(modules[a[0]])),
            key=lambda a: (a in flow.along, order[a[0]]),
        )
        if not makers:
            continue
        reason = reasons.get(root)
        if reason is None and not any(a[1] == "in" and is_mixing(modules[a[0]]) for a in unit if a[0] in modules):
            reason = flow.decides.get(makers[0], "no layer that can be narrowed reads it")
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
        if flow.care.shuts(path):
            refused[path] = "it is inside a module whose compiled code ends the process when channels are followed"
        elif path in flow.opaque:
            refused[path] = "its forward is its own: channels are not where such a layer has them"
        elif path not in flow.calls:
            refused[path] = "the forward pass does not call it (its weight is read directly, or it is not used)"
    return refused
