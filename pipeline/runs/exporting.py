"""The export of a run's steps: each to a bundle, and none that is there already."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from edgewright.edge_runtime.bundle.manifest import OperatingPoint
from edgewright.export.options import ExportOptions
from edgewright.models.sources.pretrained import LogitsOnly

from ..report.result import BUNDLE_FOLDER
from ..report.steps import StepRow
from ..stage import Edit, Progress
from ..stage_registry import stage_named
from ..store.cache import Entry
from ..store.checkpoint import read_checkpoint
from ..task import Task, split_of
from . import bundles
from .bundles import Exported


@dataclass(frozen=True)
class ExportPlan:
    """What all exports of a run have in common.

    Attributes:
        out: the run's folder.
        name: of the recipe.
        options: of the last step; the others are exported likewise, without a zip.
        fresh: export even what is finished.
        every_step: whether steps before the last are exported too, to be measured.
        progress: where to say what happens.
        timed: notes how long the work of that name took.
        load: the model of a checkpoint.
        verify: stops the run if a file was edited that its keys speak of.
    """

    out: Path
    name: str
    options: ExportOptions
    fresh: bool
    every_step: bool
    progress: Progress
    timed: Callable[[str], AbstractContextManager[None]]
    load: Callable[[Entry], nn.Module]
    verify: Callable[[], None]


def export_bundles(
    plan: ExportPlan, steps: Sequence[StepRow], entries: Sequence[Entry], tasks: Sequence[Task]
) -> dict[str, Exported]:
    """Exports the last step to ``bundle/``, and where it is asked for every other one to ``bundles/``.

    Args:
        plan: see `ExportPlan`.
        steps: the chain's rows.
        entries: their checkpoints.
        tasks: the task as it is behind each of them.

    Returns:
        The bundles by step.
    """
    made: dict[str, Exported] = {}
    for position, (row, entry, task) in enumerate(zip(steps, entries, tasks, strict=True)):
        last = position == len(steps) - 1
        if last or plan.every_step:
            target = plan.out / (BUNDLE_FOLDER if last else f"bundles/{position:02d}-{row.step}")
            options = plan.options if last else plan.options.model_copy(update={"zip": False})
            made[row.step] = export_step(plan, row, entry, target, options, task)
    return made


def export_step(
    plan: ExportPlan, row: StepRow, entry: Entry, target: Path, options: ExportOptions, task: Task
) -> Exported:
    """Exports one checkpoint to `target`, unless that very bundle is there already."""
    from edgewright.export import export_bundle

    key = bundles.bundle_key(entry.key, options, plan.name)
    if not plan.fresh and bundles.is_current(target, key):
        plan.progress.say(f"{row.step}: already exported, {target}")
        return Exported.found(target)
    for left in target.parent.glob(f".{target.name}-*"):
        # of an export that was killed; the lock says that nobody else is at work here
        shutil.rmtree(left)
    plan.progress.say(f"{row.step}: export to {target}")
    applied = read_checkpoint(entry.folder).edits
    edits = [{"stage": edit.stage, "data": edit.data} for edit in applied]
    model = plan.load(entry)
    with plan.timed(f"{row.step}.export"):
        if options.generator:
            from edgewright.export.language.generator import export_generator

            assert isinstance(model, LogitsOnly)  # as `check_generates` has seen
            texts = split_of(task, "test", needed_by="the proof of a generator").batch(range(3)).inputs[0]
            tokenizer = getattr(task, "tokenizer", None)
            manifest = export_generator(
                model, texts, target, options, name=plan.name or task.name, edits=edits, tokenizer=tokenizer
            ).manifest
        else:
            manifest = export_bundle(
                model,
                task,
                target,
                options,
                operating_points=_operating_points(applied),
                edits=edits,
                name=plan.name or None,
            ).manifest
    plan.verify()
    bundles.record(target, key, options)
    return Exported(target, manifest)


def _operating_points(edits: Sequence[Edit]) -> list[OperatingPoint]:
    """The settings of thresholds that the last stage with any has validated."""
    for edit in reversed(edits):
        found = stage_named(edit.stage).operating_points
        if found is not None:
            return list(found(edit))
    return []
