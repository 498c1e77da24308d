"""What a run tells: a row per iteration, and at the end its metrics, notes and edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...analysis.channels import surgery
from ...analysis.channels.groups import Channels
from ...analysis.cost import Cost, count
from ...metric import Score
from ...stage import Edit, Json, StageResult
from ...task import names_of_classes
from .config import CPU_STEP
from .iterations import Progress
from .selection import Selection
from .setup import NAME, Setup


def iteration_row(
    setup: Setup,
    number: int,
    model: nn.Module,
    quality: Score,
    selection: Selection,
    before: Channels,
    kept: Mapping[str, Tensor],
    good: bool,
) -> dict[str, Json]:
    """One row of the log.

    Args:
        setup: see there.
        number: of the iteration, from 1.
        model: narrowed and retrained.
        quality: of `model` on validation.
        selection: what was to go.
        before: of the model before the cut.
        kept: per group the units of `before` that are left; groups that stay whole are left out.
        good: whether the iteration stays.
    """
    cost, after = count(model, setup.inputs), before.narrowed(kept)
    return {
        "iteration": number,
        "kept": good,
        "accuracy": quality.accuracy,
        "worst_class_accuracy": quality.worst_class_accuracy,
        "macs": cost.macs,
        "mac_reduction": 1.0 - cost.macs / setup.dense.macs,
        "parameters": cost.parameters,
        "threshold": selection.threshold,
        "candidates": selection.candidates,
        "cap": selection.cap,
        "removed": {g.name: g.units - len(kept[g.name]) for g in before.groups if g.name in kept},
        "filters": {path: after.widths[(path, "out")] for g in after.groups for path in g.producers},
    }


def result_of(setup: Setup, progress: Progress, quality: Score) -> StageResult:
    """What the stage returns; `quality` is that of `progress.model` on validation."""
    narrowed = setup.channels.keep(progress.kept)
    keep = surgery.compose(setup.classes, narrowed)
    cost = count(progress.model, setup.inputs)
    data: dict[str, Json] = {
        "keep": surgery.to_json(keep),
        "attributes": surgery.changed_attributes(setup.given, keep),
    }
    if setup.opened:
        data["opened"] = setup.opened
    notes = (*progress.notes, *_notes(setup, progress, cost))
    metrics = _metrics(setup, progress, quality, cost)
    return StageResult(progress.model.to("cpu").eval(), Edit(NAME, data), metrics, progress.artifacts, notes)


def _notes(setup: Setup, progress: Progress, cost: Cost) -> list[str]:
    notes, target, reduction = [], setup.config.target, 1.0 - cost.macs / setup.dense.macs
    names = names_of_classes(setup.task)
    if not names and setup.config.criterion == "auto":
        notes.append(
            f"the task {setup.task.name!r} has no classes to be aware of: filters were scored by "
            f"{setup.criterion.name}, what each changes in the task's own loss; `criterion` names another"
        )
    if setup.classes:
        notes.append(
            f"from here on the task has {len(names)} classes ({', '.join(names)}): this and "
            "later steps are judged on their samples only"
        )
    short = target is not None and reduction < target - 0.005
    streams = setup.target.with_streams(setup.target_with_streams, "; set ") if short else ""
    if not setup.channels.keep(progress.kept):
        notes.append(f"nothing was removed, so MACs and parameters stay: {progress.stopped}{streams}")
    elif target is not None and progress.stopped == "target reached" and short:
        notes.append(
            f"{reduction:.3f} of the MACs went, not {target:g}: min_width {setup.config.min_width:g} allows no more of "
            f"the layers that can be pruned{streams}"
        )
    elif target is not None and progress.stopped != "target reached":
        notes.append(f"target_mac_reduction {target:g} was not reached ({reduction:.3f}): {progress.stopped}{streams}")
    elif target is not None and reduction > target + 0.005:
        notes.append(
            f"target_mac_reduction {target} was passed ({reduction:.3f}): widths go in steps, here of round_to "
            f"{setup.config.round_to}, and of whole groups where convolutions are grouped"
        )
    if setup.config.round_to is None and (uneven := _uneven(setup.given, progress.model)):
        named = ", ".join(uneven[:3]) + (", ..." if len(uneven) > 3 else "")
        notes.append(
            f"{len(uneven)} convolutions ({named}) now have a width that is no multiple of {CPU_STEP}, for which ONNX "
            "Runtime takes longer on a CPU than for a few channels more: `round_to: cpu` keeps to such widths"
        )
    return notes


def _uneven(before: nn.Module, after: nn.Module) -> list[str]:
    """Convolutions whose width was a multiple of what the CPU computes in one go, and is none any more."""
    return [
        path
        for path, module in after.named_modules()
        if _width(module) % CPU_STEP and _width(before.get_submodule(path)) % CPU_STEP == 0
    ]


def _width(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else 0


def _metrics(setup: Setup, progress: Progress, quality: Score, cost: Cost) -> dict[str, Any]:
    target = setup.config.target
    return {
        "criterion": setup.criterion.name,
        "mode": setup.config.mode if target is None else f"target ({setup.config.allocation})",
        "stopped": progress.stopped,
        "classes": list(names_of_classes(setup.task)) if setup.classes else None,
        "baseline_accuracy": setup.baseline.accuracy,
        "baseline_worst_class_accuracy": setup.baseline.worst_class_accuracy,
        "accuracy": quality.accuracy,
        "worst_class_accuracy": quality.worst_class_accuracy,
        "macs_before": setup.dense.macs,
        "macs": cost.macs,
        "mac_reduction": 1.0 - cost.macs / setup.dense.macs,
        "parameters_before": setup.dense.parameters,
        "parameters": cost.parameters,
        "iterations": progress.log,
        "not_pruned": dict(setup.channels.refused),
    }
