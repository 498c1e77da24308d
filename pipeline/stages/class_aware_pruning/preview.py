"""What pruning could take from a model: channels that can go, and why others cannot."""

from __future__ import annotations

from torch import Tensor, nn

from edgewright.models.sources.module_state import copied

from ...analysis.cost import count
from ...stage import Preview
from ...task import Task
from .config import ClassAwarePruningConfig
from .selection import removable
from .setup import check_kind, criterion_of, opened_for, prunable, target_of, with_streams


def preview(
    model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None, config: ClassAwarePruningConfig
) -> Preview:
    """Groups of channels, how many of each may go, and whether the target can be reached.

    Args:
        model: unchanged.
        inputs: rows; the first is used.
        task: names the criterion; None: unknown.
        config: see there.

    Raises:
        RecipeError: see `check_kind`.
        StageError: the target is out of reach, or no layer can be pruned although a number is asked for.
    """
    if task is not None:
        check_kind(task, config)
    row = tuple(x[:1] for x in inputs)
    opened = copied(model)
    opened_for(opened, row, config)
    channels = prunable(opened, row, config)
    dense = count(model, row)
    target = target_of(opened, row, config, channels, dense.macs)
    takes: dict[str, str] = {}
    for group in channels.groups:
        most = sum(removable(group, group.units, config)) * group.unit_width
        beside = f", with {len(group.producers) - 1} other layer(s)" if len(group.producers) > 1 else ""
        takes |= dict.fromkeys(group.producers, f"{most} of {group.units * group.unit_width} channels{beside}")
    reach = target.reach
    criterion = "" if task is None else f", filters are scored by {criterion_of(config, task).name}"
    figures = {
        "macs": dense.macs,
        "mac_reduction_at_most": reach,
        "target": config.target,
        "groups": len(channels.groups),
        "layers": len(takes),
        "layers_left": len(channels.refused),
    }
    if not channels.groups:
        streams = target.with_streams(lambda: with_streams(opened, row, config, dense.macs), "; set ")
        return Preview(f"nothing can go{streams}", {}, channels.refused, figures=figures)
    target.check(lambda: with_streams(opened, row, config, dense.macs))
    wanted = "" if config.target is None else f", {config.target:.0%} is asked for"
    summary = (
        f"channels of {len(takes)} layers in {len(channels.groups)} groups can go, {reach:.1%} of the MACs at "
        f"most{wanted}{criterion}"
    )
    notes = []
    if config.target is not None and reach < config.target - 0.005:
        streams = target.with_streams(lambda: with_streams(opened, row, config, dense.macs), "set ")
        notes.append(f"{config.target:.0%} is out of reach" + (f": {streams}" if streams else ""))
    return Preview(summary, takes, channels.refused, tuple(notes), figures)
