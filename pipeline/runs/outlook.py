"""What a recipe, or every stage, would do with a model: found in seconds, before anything is trained.

Each stage is asked about the model as it is given, not about what the stages before it would make of it.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.values import VALUES
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Manifest, Preprocessing
from edgewright.edge_runtime.targets.target import Target, target_named, target_names
from edgewright.export.bundle import export_bundle
from edgewright.export.options import ExportOptions
from edgewright.export.source import Source, answers_of
from edgewright.export.target import held_to
from edgewright.models.sources.module_state import untouched

from ..analysis.cost import count
from ..errors import EdgewrightError
from ..recipe.recipe import Recipe, StageEntry
from ..stage import Json, Preview
from ..stage_registry import stage_named, usable_stages
from ..task import Batch, Task
from ..tasks import build_task
from .base_model import bound_to_model, build_named, folded
from .determinism import seeded
from .preparation import check_answers, example_inputs, tasks_of

_ROWS = 2
_PROOF_ROWS = 8


@dataclass(frozen=True)
class StageOutlook:
    """Of one stage.

    Attributes:
        step: its id in the recipe, or the stage's name.
        stage: its name.
        preview: None where it is refused, or says nothing of itself.
        refused: why a run would stop here; None if it would not.
    """

    step: str
    stage: str
    preview: Preview | None
    refused: str | None


@dataclass(frozen=True)
class TargetOutlook:
    """Of one kind of device.

    Attributes:
        target: its name.
        runtime: its oldest ONNX Runtime.
        reads: whether that reads the file, and the device has room for it.
        reason: why not; empty if it does.
        aligned: share of the MACs in layers whose width is a multiple of what the device computes in one go; None where
            no layer multiplies.
    """

    target: str
    runtime: str
    reads: bool
    reason: str
    aligned: float | None


@dataclass(frozen=True)
class ExportOutlook:
    """Of the model as it is given.

    Attributes:
        refused: why it does not become a bundle; None if it does.
        answers: kind of every output by name.
        figures: opset, ir_version, file_bytes, nodes, rows that were compared, max_abs_diff, seconds.
        targets: what kinds of devices make of it.
    """

    refused: str | None
    answers: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Json] = field(default_factory=dict)
    targets: tuple[TargetOutlook, ...] = ()


@dataclass(frozen=True)
class Outlook:
    """Of a model, alone or in a recipe.

    Attributes:
        model: its name.
        task: its name; None for a model alone.
        macs: of one row.
        parameters: shared ones once.
        stages: in order; for a model alone every stage with its defaults.
        export: None where it was not tried.
        notes: about the model, its weights and its folds.
        seconds: that all of it took.
    """

    model: str
    task: str | None
    macs: int
    parameters: int
    stages: tuple[StageOutlook, ...]
    export: ExportOutlook | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def refused(self) -> bool:
        """Whether a run would be refused, or could not export; of a model alone only the latter."""
        stages = self.task is not None and any(stage.refused is not None for stage in self.stages)
        return stages or (self.export is not None and self.export.refused is not None)

    def to_dict(self) -> dict[str, Json]:
        """Plain data for JSON."""
        return {**asdict(self), "refused": self.refused}


def outlook(recipe: Recipe, shape: tuple[int, ...] | None, alone: bool, export: bool = True) -> Outlook:
    """Asks every stage, and tries the export.

    Args:
        recipe: names the model; task and stages too unless the model is `alone`.
        shape: of the inputs, batch first; None: rows of the task.
        alone: the recipe is nothing but a model.
        export: whether to try that.

    Raises:
        ModelError: the model cannot be built, or does not run on the inputs.
        DataError: the task cannot be made.
    """
    began = time.perf_counter()
    task: Task | None = None
    if not alone:
        with seeded(recipe.seed):
            task = bound_to_model(build_task(recipe.task.name, recipe.task.args, recipe.folder), recipe)
    inputs = example_inputs(recipe, shape) if shape is not None or task is None else _rows(task)
    notes: list[str] = []
    model, folds = folded(build_named(recipe, notes=notes), recipe, inputs)
    notes += folds.notes
    cost = count(model, inputs)
    if alone:
        planned = [(stage.name, StageEntry.model_validate(stage.name)) for stage in usable_stages()]
    else:
        planned = list(zip(recipe.step_ids, recipe.stages, strict=True))
    stages = tuple(_stage(step, entry, recipe, model, inputs, task) for step, entry in planned)
    exported = _export(recipe, model, inputs, task) if export else None
    return Outlook(
        recipe.model.name,
        None if task is None else task.name,
        cost.macs,
        cost.parameters,
        stages,
        exported,
        tuple(notes),
        round(time.perf_counter() - began, 1),
    )


def _rows(task: Task) -> tuple[Tensor, ...]:
    split = task.splits["test" if "test" in task.splits else next(iter(task.splits))]
    return split.batch(list(range(min(_ROWS, len(split))))).inputs


def _stage(
    step: str, entry: StageEntry, recipe: Recipe, model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None
) -> StageOutlook:
    stage, preview, refused = stage_named(entry.name), None, None
    try:
        if task is not None:
            check_answers(stage, task)
            tasks_of(recipe, task)
            if stage.check is not None:
                stage.check(model, task, entry.config)
        if stage.preview is not None:
            with untouched(model):
                preview = stage.preview(model, inputs, task, entry.config)
    except EdgewrightError as error:
        refused = str(error)
    return StageOutlook(step, entry.name, preview, refused)


def _export(recipe: Recipe, model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None) -> ExportOutlook:
    """Exports the model for a trial, proven on a few rows."""
    if recipe.export.generator:
        return ExportOutlook(None, {}, {"generator": True})
    began = time.perf_counter()
    options = recipe.export.model_copy(update={"target": None, "split": False, "zip": False})
    try:
        source: Source = _Alone(model, inputs) if task is None else task
        with tempfile.TemporaryDirectory(prefix="edgewright-check-") as folder:
            made = export_bundle(
                model, source, Path(folder, "bundle"), _without_exits(options), parity_rows=_PROOF_ROWS
            )
            size = sum(path.stat().st_size for path in made.path.glob("model.onnx*"))
    except EdgewrightError as error:
        return ExportOutlook(str(error))
    manifest = made.manifest
    figures = {
        "opset": manifest.opset,
        "ir_version": manifest.ir_version,
        "file_bytes": size,
        "nodes": len(manifest.nodes),
        "rows": manifest.parity.rows,
        "max_abs_diff": manifest.parity.max_abs_diff,
        "seconds": round(time.perf_counter() - began, 1),
    }
    names = (recipe.export.target,) if recipe.export.target is not None else target_names()
    targets = tuple(_target(target_named(name), manifest, model, inputs, size) for name in names)
    return ExportOutlook(None, {spec.name: spec.kind for spec in answers_of(source)}, figures, targets)


def _without_exits(options: ExportOptions) -> ExportOptions:
    """`batch: compact` is about exits, which the given model does not have."""
    return options.model_copy(update={"batch": "auto"}) if options.batch == "compact" else options


def _target(
    target: Target, manifest: Manifest, model: nn.Module, inputs: tuple[Tensor, ...], size: int
) -> TargetOutlook:
    reads, reason = True, ""
    try:
        held_to(target.name, manifest)
    except EdgewrightError as error:
        reads, reason = False, str(error)
    if reads and target.memory_bytes is not None and size > target.memory_bytes:
        reads, reason = False, f"the file has {size:,} bytes, and the device {target.memory_bytes:,}"
    return TargetOutlook(target.name, target.oldest_onnxruntime, reads, reason, _aligned(target, model, inputs))


def _aligned(target: Target, model: nn.Module, inputs: tuple[Tensor, ...]) -> float | None:
    """Share of the MACs of convolutions and linear layers whose outputs are a multiple of what is computed at once."""
    whole = good = 0
    for path, cost in count(model, inputs).per_module.items():
        module = model.get_submodule(path)
        width = getattr(module, "out_channels", getattr(module, "out_features", None))
        if width is None:
            continue
        coarse = target.channel_alignment
        step = coarse if width >= 4 * coarse else target.narrow_channel_alignment
        whole += cost.macs
        good += cost.macs if width % step == 0 else 0
    return good / whole if whole else None


class _Alone:
    """A model without a task, as a source of the export: random rows, and every tensor that it returns as values."""

    labels: tuple[str, ...] = ()
    preprocessing = Preprocessing()

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.name = type(model).__name__
        self.input_names = tuple(f"input{i}" if len(inputs) > 1 else "input" for i in range(len(inputs)))
        self.dynamic_axes: tuple[Mapping[int, str], ...] = tuple({0: "batch"} for _ in inputs)
        self.splits: Mapping[Any, _Random] = {"test": _Random(inputs)}
        with torch.no_grad():
            output = model(*inputs)
        self.answers = _answers(output)


class _Random:
    """Rows like those that are given, with other numbers."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return _PROOF_ROWS

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash for every row."""
        return [hashlib.sha256(str(row).encode()).digest() for row in range(len(self))]

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The rows at `indices`."""
        chosen = [int(row) for row in indices]
        made = [[self._row(x, row) for row in chosen] for x in self._inputs]
        return Batch(tuple(torch.stack(rows) for rows in made), torch.zeros(len(chosen), dtype=torch.int64))

    def _row(self, like: Tensor, row: int) -> Tensor:
        first = like[row % len(like)]
        if not like.is_floating_point():
            return first
        return torch.rand(first.shape, generator=torch.Generator().manual_seed(row), dtype=first.dtype)


def _answers(output: Any) -> tuple[AnswerSpec, ...]:
    if isinstance(output, Tensor):
        return (AnswerSpec("output", VALUES),)
    entries = list(output.items()) if isinstance(output, Mapping) else list(enumerate(output))
    return tuple(
        AnswerSpec(str(leaf) if isinstance(leaf, str) else f"output{leaf}", VALUES, leaf=leaf)
        for leaf, value in entries
        if isinstance(value, Tensor) and value.is_floating_point()
    )
