"""Which layers of a model would be factorized, and which of them may share a basis."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, nn

from edgewright.models.sources.module_state import copied

from ...analysis.layers import discover
from ...analysis.opening import RECURRENT, open_layers
from ...stage import Preview
from ...task import Task
from .config import BasisSharingConfig
from .grouping import candidates, select


def preview(model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None, config: BasisSharingConfig) -> Preview:
    """Candidate groups; whether sharing pays within one, the calibration data decide.

    Args:
        model: unchanged.
        inputs: rows.
        task: not needed.
        config: see there.

    Raises:
        StageError: a pattern of the recipe matches no layer.
    """
    del task
    model = copied(model).eval()
    open_layers(model, inputs, RECURRENT)
    graph = discover(model, inputs)
    chosen, left = select(graph, config.layers.include, config.layers.exclude, config.min_width)
    groups = candidates(chosen, config.groups, config.group_size, config.layers.private)
    takes = {}
    for group in groups:
        paths = [member.path for member in group.members]
        for path in paths:
            others = ", ".join(other for other in paths if other != path)
            takes[path] = f"may share a basis with {others}" if others else "a basis of its own"
    weights = sum(layer.fan_in * layer.output_width for layer in chosen)
    whole = sum(parameter.numel() for parameter in model.parameters())
    sharing = sum(len(group.members) > 1 for group in groups)
    figures = {"layers": len(chosen), "groups": len(groups), "sharing_groups": sharing, "weights": weights}
    leaves = {one.path: one.reason for one in left} | _of_other_types(model, takes.keys() | {one.path for one in left})
    if not chosen:
        return Preview("nothing can be factorized", {}, leaves, figures=figures)
    asked = f"; ratio {config.ratio:g} removes about {config.ratio * weights / whole:.1%} of the parameters"
    summary = (
        f"{len(chosen)} layers in {len(groups)} groups can be factorized, {sharing} of which may share a basis"
        + (asked if config.rank is None else "")
    )
    return Preview(summary, takes, leaves, figures=figures)


def _of_other_types(model: nn.Module, known: Set[str]) -> dict[str, str]:
    """Modules with matrices of their own that are neither taken nor refused: their type is not factorized."""
    return {
        path: f"a {type(module).__name__}, which is not factorized"
        for path, module in model.named_modules()
        if path and path not in known and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
