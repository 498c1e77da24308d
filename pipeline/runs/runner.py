"""Runs a recipe: base model, stages, export, measurement, report. What is finished is never done again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.edge_runtime.bundle.golden import read_npz, write_npz
from edgewright.edge_runtime.measure.paired import Drop, paired_drop
from edgewright.edge_runtime.versions import versions
from edgewright.models.sources.user_modules import EditedError, imports_held

from ..errors import EdgewrightError, EditedSourceError, StageError
from ..quality_drop import quality_drop
from ..recipe.recipe import ControlSpec, Recipe, StageEntry, load_recipe, save_resolved
from ..report.report import write_report
from ..report.result import BUNDLE_FOLDER, RESOLVED_FILE, RunResult
from ..report.steps import Measured, StepRow, measure
from ..sources import module_digests
from ..stage import Edit, Json, Progress, StageResult
from ..stage_registry import stage_module, stage_named
from ..store.atomic import pretty_json, remove_leftovers, write_text
from ..store.cache import BASE, Cache, Entry, Key, stage_key
from ..store.checkpoint import LIBRARIES, RUN_FILE, BaseSpec, load_checkpoint, read_checkpoint
from ..store.context import FolderContext, Quiet
from ..store.output import output_folder
from ..task import names_of_classes
from . import bundles
from .base_model import build_base, folded, trainings_first
from .control import CONTROL, check_control, control_recipe
from .determinism import deterministic_torch, mixed_seed, seeded, torch_threads
from .exporting import ExportPlan, export_bundles, export_step
from .inputs import Inputs
from .measurement import compare_bundles, measure_bundles
from .model_check import first_rows
from .preparation import check_bundle_place, prepare, remarks
from .watch import Watch

RUN_SCHEMA_VERSION = 1


def run(
    recipe: Recipe | str | Path, out: str | Path, fresh: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs `recipe` into the folder `out`.

    A run that was interrupted, in whatever way, goes on where it was when it is called again, and ends with
    the same checkpoints and the same bundle, byte for byte. Everything that can be wrong with the recipe, the
    model and the data is found before anything is computed.

    Args:
        recipe: a recipe, or the path of one.
        out: made when needed; several recipes may share it one after the other.
        fresh: do everything again, even what is finished.
        progress: default silent.

    Raises:
        EdgewrightError: see `pipeline.errors`; finished stages stay.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with output_folder(Path(out)) as folder, torch_threads(recipe.threads), _unedited(recipe) as watch:
        check_bundle_place(folder / BUNDLE_FOLDER)
        inputs = prepare(recipe, watch)
        if recipe.control is not None:
            check_control(inputs, recipe.control)
        with deterministic_torch(inputs.device):
            return _Run(inputs, folder, fresh, progress or Quiet()).go()


@contextlib.contextmanager
def _unedited(recipe: Recipe) -> Iterator[Watch]:
    """Holds the user's modules as they are imported; whatever fails after an edit fails because of the edit."""
    # ours, before anything of them is used: the digests that keys will hold
    module_digests("edgewright.pipeline.report.steps", *(stage_module(entry.name) for entry in recipe.stages))
    bundles.export_digests()
    with imports_held() as imported:
        watch = Watch(imported)
        watch.check()
        try:
            yield watch
        except EditedError as error:
            raise EditedSourceError(str(error)) from error
        except Exception:
            watch.check()
            raise


class _Run:
    """One run under the lock of its folder."""

    def __init__(self, inputs: Inputs, out: Path, fresh: bool, progress: Progress) -> None:
        self.inputs, self.recipe, self.out, self.fresh = inputs, inputs.recipe, out, fresh
        self.root = inputs.recipe.folder
        self.progress = progress
        self.cache = Cache(out)
        self.seconds = _recorded_seconds(out / RUN_FILE)
        self.started = _now()
        self.rows: dict[str, Mapping[str, NDArray[Any]]] = {}
        """By step what the test rows are worth, see `Measured.rows`."""

    def go(self) -> RunResult:
        """All phases in order."""
        save_resolved(self.recipe, self.out / RESOLVED_FILE)
        self._record("running")
        entries = [self._base()]
        for position, stage in enumerate(self.recipe.stages, start=1):
            entries.append(self._stage(position, stage, entries[-1]))
        reference = self._reference()
        ids = ("dense" if reference == "dense" else BASE, *self.recipe.step_ids)
        steps = [
            self._row(position, step, entry) for position, (step, entry) in enumerate(zip(ids, entries, strict=True))
        ]
        exported = export_bundles(self._plan(), steps, entries, self.inputs.tasks)
        made = {step: one.path for step, one in exported.items()}
        bundle, manifest = made[steps[-1].step], exported[steps[-1].step].manifest
        steps = [bundles.with_bundle(row, exported[row.step]) if row.step in exported else row for row in steps]
        controls: tuple[str, ...] = ()
        if self.recipe.control is not None:
            steps.append(self._control(self.recipe.control, steps[-1].macs, made))
            controls = (CONTROL,)
        measured = self._measure(made)
        comparison = self._compare(made, reference, bundle)
        steps = [_with_latency(row, measured) for row in steps]
        drops = self._drops(ids, reference)
        result = RunResult(
            self.out,
            self.recipe,
            tuple(steps),
            reference,
            bundle,
            manifest,
            made,
            tuple(measured),
            controls=controls,
            comparison=comparison,
            drops=drops,
            accuracy_drop=self._accuracy_drop(ids[-1], reference) if ids[-1] in drops else None,
        )
        result = dataclasses.replace(result, report=write_report(result, self.inputs.tasks, self.root))
        self._record("finished")
        return result

    def _control(self, spec: ControlSpec, macs: float, made: dict[str, Path]) -> StepRow:
        """Trains and exports the control beside the chain; its checkpoints and its bundle are kept like all others."""
        recipe = control_recipe(self.inputs, spec, macs)
        beside = _Run(prepare(recipe, self.inputs.watch), self.out, self.fresh, self.progress)
        entry = beside._base()
        for position, stage in enumerate(recipe.stages, start=1):
            entry = beside._stage(position, stage, entry)
        row = beside._row(len(recipe.stages), CONTROL, entry)
        self.rows |= beside.rows
        self.seconds.update(beside.seconds)
        if self.recipe.benchmark.enabled:
            target = self.out / "bundles" / CONTROL
            options = recipe.export.model_copy(update={"zip": False})
            exported = export_step(beside._plan(), row, entry, target, options, beside.inputs.tasks[-1])
            made[CONTROL] = exported.path
            row = bundles.with_bundle(row, exported)
        return row

    def _plan(self) -> ExportPlan:
        return ExportPlan(
            self.out,
            self.recipe.name,
            self.recipe.export,
            self.fresh,
            self.recipe.benchmark.enabled,
            self.progress,
            self.timed,
            self.load,
            self.verify,
        )

    def _measure(self, made: Mapping[str, Path]) -> list[dict[str, Json]]:
        options = self.recipe.benchmark
        if not options.enabled:
            return []
        return measure_bundles(made, self.inputs.tasks[-1], options, self.recipe.seed, self.progress)

    def _compare(self, made: Mapping[str, Path], reference: str, bundle: Path) -> dict[str, Json] | None:
        if not self.recipe.benchmark.enabled or made.get(reference, bundle) == bundle:
            return None
        self.progress.say(f"{reference} and the result: latency side by side")
        return compare_bundles(made[reference], bundle, self.inputs.tasks[-1], self.recipe.benchmark, self.recipe.seed)

    def _base(self) -> Entry:
        key = self.inputs.base_key
        entry = self._finished(0, BASE, BASE, key)
        if entry is None:
            with self.timed(BASE):
                self.verify()
                made = build_base(self.inputs, self.progress)
                spec = dataclasses.replace(self.inputs.base, folds=made.folds.data())
                result = StageResult(made.model, Edit(BASE), notes=made.notes)
                entry = self._store(0, BASE, key, spec, result, (), made.late)
        for note in (*remarks(self.inputs), *entry.notes):
            self.progress.say(f"note: {note}")
        return entry

    def _stage(self, position: int, asked: StageEntry, given: Entry) -> Entry:
        stage = stage_named(asked.name)
        folds = self.inputs.folds and position == trainings_first(self.recipe)
        key = stage_key(asked.name, asked.config, position, given.key, self.recipe.seed, self.inputs.environment, folds)
        step = self.recipe.step_ids[position - 1]
        entry = self._finished(position, asked.name, step, key)
        if entry is not None:
            return entry
        before = read_checkpoint(given.folder)
        # always from the disk, so that an interrupted run sees the same model as an uninterrupted one
        model = self.load(given)
        seed = mixed_seed(self.recipe.seed, position)
        context = FolderContext(self.cache.state(key), seed, self.inputs.device, self.progress, self.verify)
        with self.timed(step), seeded(seed):
            result = stage.fit(model, self.inputs.tasks[position - 1], asked.config, context)
        compressed, base, notes = _checked(result, asked.name), before.base, result.notes
        if folds and not before.late:  # what a first call makes is not there when a checkpoint is folded again
            compressed, found = folded(compressed, self.recipe, first_rows(self.inputs.tasks[position]))
            base, notes = dataclasses.replace(base, folds=found.data()), (*notes, *found.notes)
        return self._store(
            position,
            asked.name,
            key,
            base,
            dataclasses.replace(result, model=compressed, notes=notes),
            (*before.edits, result.edit),
            before.late,
        )

    def verify(self) -> None:
        """Stops the run if a file was edited that its keys speak of."""
        self.inputs.watch.check()

    def load(self, entry: Entry) -> nn.Module:
        """The model of an entry, by the code that the keys hold."""
        self.verify()
        return load_checkpoint(entry.folder, self.root)

    def _store(
        self,
        position: int,
        stage: str,
        key: Key,
        base: BaseSpec,
        made: StageResult,
        edits: Sequence[Edit],
        late: Mapping[str, Json],
    ) -> Entry:
        self.verify()
        return self.cache.store(
            position,
            stage,
            key,
            base,
            self.root,
            edits,
            made.model,
            made.metrics,
            made.notes,
            made.artifacts,
            sources=self.inputs.base_sources,
            late=late,
            verify=self.verify,
        )

    def _finished(self, position: int, stage: str, step: str, key: Key) -> Entry | None:
        """The entry if it can be used; says what will happen otherwise."""
        if self.fresh:
            self.cache.drop_state(key)
            self.progress.say(f"{step}: from the beginning (--fresh)")
            return None
        entry = self.cache.find(position, stage, key)
        if entry is not None:
            self.cache.drop_state(key)
            self.progress.say(f"{step}: already done, {entry.folder.name}")
            return entry
        reason = self.cache.why_missed(position, stage, key)
        if self.cache.state(key).is_dir():
            self.progress.say(f"{step}: goes on where it was interrupted")
        else:
            self.progress.say(f"{step}: starts" + (f", because {reason}" if reason else ""))
        return None

    def _row(self, position: int, step: str, entry: Entry) -> StepRow:
        """The report's row; measured once for a checkpoint and the code that measures."""
        stage = BASE if position == 0 else self.recipe.stages[position - 1].name
        key = Key({"checkpoint": entry.key.digest, "sources": module_digests("edgewright.pipeline.report.steps")})
        path = self.out / "rows" / f"{entry.folder.name}.json"
        remove_leftovers(path.parent)
        recorded = None if self.fresh else _recorded(path, key)
        if recorded is None:
            self.progress.say(f"{step}: quality and cost")
            recorded = measure(self.load(entry), self.inputs.tasks[position], self.inputs.device)
            self.verify()
            path.parent.mkdir(exist_ok=True)
            write_npz(path.with_suffix(".npz"), recorded.rows)
            write_text(path, pretty_json({"key": key.digest, "fields": recorded.fields}))
        fields, self.rows[step] = recorded
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        place = entry.folder.relative_to(self.out).as_posix()
        notes = entry.notes if position else (*remarks(self.inputs), *entry.notes)
        return StepRow(step=step, stage=stage, checkpoint=place, metrics=entry.metrics, notes=notes, **values)

    def _drops(self, ids: Sequence[str], reference: str) -> dict[str, Drop]:
        """How much worse each later step is than the reference, on the same test rows."""
        tasks = dict(zip(ids, self.inputs.tasks, strict=True))
        classes = names_of_classes(tasks[reference])
        found: dict[str, Drop] = {}
        for step in (*ids[ids.index(reference) + 1 :], *(step for step in self.rows if step not in ids)):
            task = tasks.get(step, self.inputs.tasks[-1])
            if names_of_classes(task) != classes:
                continue  # judged on other samples
            drop = quality_drop(task.metric, self.rows[reference].get("each"), self.rows[step].get("each"))
            if drop is not None:
                found[step] = drop
        return found

    def _accuracy_drop(self, final: str, reference: str) -> Drop | None:
        before, after = (self.rows[step].get("right") for step in (reference, final))
        return None if before is None or after is None else paired_drop(before, after)

    def _reference(self) -> str:
        reference = "dense"
        for step, entry in zip(self.recipe.step_ids, self.recipe.stages, strict=True):
            if not stage_named(entry.name).dense:
                break
            reference = step
        return reference

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Notes how long `work` took, for run.json."""
        start = time.monotonic()
        yield
        self.seconds[work] = round(time.monotonic() - start, 3)
        self._record("running")

    def _record(self, state: str) -> None:
        """run.json: for people and for `load_checkpoint`; not part of what is equal from run to run."""
        data = {
            "schema_version": RUN_SCHEMA_VERSION,
            "recipe": self.recipe.name,
            "root": str(self.root),
            "state": state,
            "started": self.started,
            "changed": _now(),
            "seconds": self.seconds,
            "versions": versions(LIBRARIES),
            "threads": torch.get_num_threads(),
        }
        write_text(self.out / RUN_FILE, pretty_json(data))


def _checked(result: StageResult, stage: str) -> nn.Module:
    """The stage's model on the CPU in eval mode; refuses NaN before it is stored."""
    model = result.model.to("cpu").eval()
    # buffers may hold infinities on purpose: attention masks do
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    bad += [name for name, value in model.named_buffers() if torch.isnan(value).any()]
    if bad:
        raise StageError(f"{stage} left NaN or infinity in {bad[0]!r}: lower its learning rate or its compression")
    return model


def _with_latency(row: StepRow, measured: Sequence[Mapping[str, Json]]) -> StepRow:
    for figures in measured:
        if figures["step"] == row.step and figures.get("latency_ms"):
            latency = figures["latency_ms"]
            return dataclasses.replace(row, p50_ms=latency.get("p50"), p90_ms=latency.get("p90"))
    return row


def _recorded(path: Path, key: Key) -> Measured | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["key"] != key.digest:
            return None
        return Measured(dict(data["fields"]), read_npz(path.with_suffix(".npz")))
    except (OSError, ValueError, KeyError, TypeError, EdgewrightError):
        return None


def _recorded_seconds(path: Path) -> dict[str, float]:
    """How long the steps took that an earlier run finished."""
    try:
        return {str(work): float(value) for work, value in json.loads(path.read_text())["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
