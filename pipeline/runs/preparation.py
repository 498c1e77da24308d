"""Everything that can be wrong with a recipe is found here, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import MANIFEST_FILE
from edgewright.edge_runtime.inference.providers import provider_names
from edgewright.edge_runtime.process.path_text import check_path
from edgewright.export.source import Answering, answers_of
from edgewright.models import registry
from edgewright.models.sources.files_read import files_read
from edgewright.models.sources.precision import HALF
from edgewright.models.sources.python_source import PREFIX

from ..errors import DataError, InputError, ModelError, OutputError, ProviderError, RecipeError
from ..metric import IGNORED
from ..recipe.recipe import Recipe, check_order
from ..stage import Stage
from ..stage_registry import requirements, stage_named
from ..store.cache import base_key, environment
from ..store.checkpoint import BaseSpec
from ..task import (
    Task,
    check_classes,
    check_unique,
    classes_without_samples,
    data_digests,
    names_of_classes,
    split_of,
    target_parts,
)
from ..tasks import build_task, task_sources
from ..tasks.class_subset import restricted
from ..training.training import trainings_in
from .base_model import bound_to_model, build_named, folded, trainings_first
from .determinism import seeded
from .inputs import Inputs
from .model_check import check_model, first_rows
from .training_check import PlannedTraining, check_training
from .watch import Watch


def prepare(recipe: Recipe, watch: Watch | None = None) -> Inputs:
    """Checks the recipe against this machine, the model's source, the weights file and the data.

    Args:
        recipe: what to run.
        watch: that of the run, whose imports are held; None for a preparation that nothing follows.

    Raises:
        EditedSourceError: a file was edited meanwhile.
        StageOrderError: the stages stand in an order that cannot work.
        ProviderError: the device is not there.
        ModelError: an unknown model, or weights that are not there.
        RecipeError: a stage names layers that the model does not have, or that it cannot work on.
        DataError: data missing, damaged or overlapping, or a split or class that a stage needs is empty.
    """
    check_order(recipe)
    check_path(recipe.folder, "the recipe's folder")
    if recipe.model.weights is not None:
        check_path(recipe.resolve(recipe.model.weights), "the weights file")
    watch = Watch({}) if watch is None else watch
    device = device_named(recipe.device)
    _check_later_phases(recipe)
    base = BaseSpec(recipe.model.name, recipe.model.args)
    read_by_model, read_by_task = dict[Path, str](), dict[Path, str]()
    try:
        with files_read(recipe.folder, read_by_model):
            base_sources = watch.digests(registry.sources(base.name, recipe.folder), recipe.folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    weights = None if recipe.model.weights is None else _weights_digest(recipe.resolve(recipe.model.weights), watch)
    sources = watch.digests(task_sources(recipe.task.name, recipe.folder), recipe.folder)
    with seeded(recipe.seed):
        with files_read(recipe.folder, read_by_task):
            task = build_task(recipe.task.name, recipe.task.args, recipe.folder)
        task = bound_to_model(task, recipe)
        check_labels(task)
        answers_of(task)  # refuses those that contradict themselves
        check_inputs(task)
        tasks = tasks_of(recipe, task)
        check_splits(recipe, tasks)
        data = data_digests(task)
    watch.data(task)
    folds = check_stages(recipe, tasks, read_by_model)
    if base.name.startswith(PREFIX):
        # it is built anew at every step: what it reads is as much a source of it as its code
        base_sources |= watch.read(read_by_model, recipe.folder)
    if recipe.task.name.startswith(PREFIX):
        # what they hold is in the data's digests; an edit stops the run all the same
        watch.read(read_by_task, recipe.folder)
    around = environment(device)
    key = base_key(
        base,
        base_sources,
        weights,
        BaseSpec(recipe.task.name, recipe.task.args),
        sources,
        data,
        recipe.seed,
        around,
        recipe.model.fold,
    )
    watch.check()
    return Inputs(recipe, device, task, tasks, base, key, base_sources, around, watch, folds)


def check_bundle_place(bundle: Path) -> None:
    """Refuses a place for the bundle that holds something else.

    Raises:
        OutputError: names it.
    """
    if (
        bundle.exists()
        and not (bundle / MANIFEST_FILE).is_file()
        and not (bundle.is_dir() and not any(bundle.iterdir()))
    ):
        raise OutputError(f"{bundle} is in the way and is no bundle: move it, or choose another folder with --out")


def device_named(name: str) -> torch.device:
    """The torch device.

    Raises:
        ProviderError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            f"the recipe asks for `device: cuda`, and torch {torch.__version__} finds no CUDA device here: "
            "use `--set device=cpu`, or install a torch with CUDA and its driver"
        )
    return torch.device(name)


def tasks_of(recipe: Recipe, task: Task) -> tuple[Task, ...]:
    """`task` as the first stage sees it, and as it is after every stage.

    Raises:
        DataError: a stage keeps classes that there are not.
    """
    tasks = [task]
    for entry in recipe.stages:
        classes = stage_named(entry.name).classes
        wanted = () if classes is None else classes(entry.config)
        tasks.append(restricted(tasks[-1], wanted, asked_by=f"stage {entry.name!r}"))
    return tuple(tasks)


def check_splits(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuses a task that lacks what the report or a stage reads.

    Args:
        recipe: with at most one task per stage and one more.
        tasks: see `tasks_of`; a stage reads of its classes what the task after it has.

    Raises:
        DataError: names the split or class, and who needs it.
    """
    split_of(tasks[0], "test", needed_by="the report")
    for entry, task in zip(recipe.stages, tasks[1:], strict=True):
        stage = stage_named(entry.name)
        check_answers(stage, task)
        for split in stage.needed_splits(entry.config):
            split_of(task, split, needed_by=f"stage {entry.name!r}")
            if stage.needs_classes(entry.config, task) and split in ("train", "calibration"):
                check_classes(task, split, needed_by=f"stage {entry.name!r}")


def check_answers(stage: Stage[Any], task: Task) -> None:
    """Refuses a task whose model answers in a way that the stage does not serve.

    Raises:
        DataError: names the kinds of both.
    """
    if stage.answers is None or not isinstance(task, Answering):
        return  # of a task that says nothing about its outputs the stage's own checks can tell
    answers = answers_of(task)
    kinds = list(dict.fromkeys(spec.kind for spec in answers))
    if len(answers) == 1 and answers[0].leaf is None and kinds[0] in stage.answers:
        return
    several = len(answers) > 1 or answers[0].leaf is not None
    raise DataError(
        f"the stage {stage.name!r} serves models that return one tensor and answer {', '.join(sorted(stage.answers))}, "
        f"and the task {task.name!r} answers {', '.join(kinds)}"
        + (f" in {len(answers)} named output(s)" if several else "")
        + ": leave the stage out for this task"
    )


def check_stages(recipe: Recipe, tasks: Sequence[Task], read: dict[Path, str]) -> bool:
    """Shows the base model to every stage that has something to say about it or trains it, before any compute.

    Args:
        recipe: names model and stages.
        tasks: see `tasks_of`.
        read: gets the user's files that the model reads when it is built, the weights file left out; see `files_read`.

    Returns:
        Whether something can be folded in the model, see `models.sources.folding`; False if nobody asked for the model.

    Raises:
        ModelError: see `build_named`, `check_model` and `check_training`.
        InputError: see `Stage.check` and `check_training`.
    """
    checked = [(stage_named(entry.name).check, entry.config) for entry in recipe.stages]
    first = trainings_first(recipe)
    before, planned = (list(_trainings(recipe, tasks, part)) for part in (slice(first), slice(first, None)))
    asked = bool(before or planned) or any(check for check, _ in checked)
    if not asked and not recipe.model.name.startswith(PREFIX):
        return False
    rows = first_rows(tasks[0])
    with files_read(recipe.folder, read):
        model = build_named(recipe)
    if recipe.model.weights is not None:
        read.pop(recipe.resolve(recipe.model.weights).resolve(), None)
    check_model(model, tasks[0], recipe.model.name)
    with seeded(recipe.seed):
        check_training(model, tasks[0], before, recipe.model.name)
    model, folds = folded(model, recipe, rows)
    for check, config in checked:
        if check is not None:
            check(model, tasks[0], config)
    with seeded(recipe.seed):
        check_training(model, tasks[0], planned, recipe.model.name)
    return bool(folds)


def _trainings(recipe: Recipe, tasks: Sequence[Task], part: slice) -> Iterator[PlannedTraining]:
    for entry, task in zip(recipe.stages[part], tasks[1:][part], strict=True):
        for section, training in (stage_named(entry.name).trains or trainings_in)(entry.config).items():
            place = ".".join(filter(None, (entry.id or entry.name, section)))
            samples = len(split_of(task, "train", needed_by=place))
            yield PlannedTraining(place, training, samples)


def check_labels(task: Task) -> None:
    """Refuses a task with nothing to tell apart, classes that share a name, and targets that are none of its classes.

    Raises:
        DataError: one label, where none at all belongs to a task without classes, a label twice; or names the split.
    """
    check_unique(task.labels, task.name)
    if len(task.labels) == 1:
        raise DataError(
            f"the task {task.name!r} has the one label {task.labels[0]!r}: a classifier needs at least two classes"
        )
    _check_targets(task)


def _check_targets(task: Task) -> None:
    for name, split in task.splits.items():
        place = f"split {name!r} of the task {task.name!r}"
        for targets in target_parts(split):
            _check_part(task, targets, place)


def _check_part(task: Task, targets: Tensor, place: str) -> None:
    if targets.dtype in HALF:
        raise DataError(f"{place} has targets in {_dtype(targets)}: give them in float32, `.float()`")
    if not task.labels:
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dim() != 1:
        raise DataError(
            f"{place} has targets {_dtype(targets)} {list(targets.shape)}, and the task has labels: a classifier's "
            "targets are the numbers of the classes, int64 [samples]; a task that predicts something else has no labels"
        )
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= len(task.labels)))]
    if len(wrong):
        raise DataError(
            f"{place} has the target {int(wrong[0])}, and the {len(task.labels)} labels are numbered from 0 to "
            f"{len(task.labels) - 1}: add the label, or correct the target"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_inputs(task: Task) -> None:
    """Refuses a task whose samples have more or fewer inputs than names, or inputs in half precision.

    Raises:
        DataError: names the split and both numbers, or the input.
    """
    for name, split in task.splits.items():
        inputs = split.batch([0]).inputs if len(split) else ()
        for input_name, x in zip(task.input_names, inputs, strict=False):
            if x.dtype in HALF:
                raise DataError(
                    f"the input {input_name!r} of split {name!r} of the task {task.name!r} is {_dtype(x)}: give it in "
                    "float32, `.float()`; models are trained, compared and exported in float32"
                )
        given = len(inputs) if len(split) else len(task.input_names)
        if given != len(task.input_names):
            raise DataError(
                f"the samples of split {name!r} of the task {task.name!r} have {given} input(s) and there are "
                f"{len(task.input_names)} input_names ({', '.join(task.input_names)}): each input needs one name, in "
                "the order in which the model takes them"
            )


def remarks(inputs: Inputs) -> tuple[str, ...]:
    """What the user should know of data and recipe, although the run can go on."""
    task, notes = inputs.task, []
    classes = len(names_of_classes(task))
    if not classes:
        return ()
    for name, split in task.splits.items():
        empty = classes_without_samples(task, split)
        if empty:
            listed = ", ".join(map(repr, empty[:5])) + (" ..." if len(empty) > 5 else "")
            what = {
                "train": "the network cannot learn them",
                "calibration": "statistics are taken without them",
                "validation": "choices and floors do not see them",
                "test": "the report cannot judge them, and the worst class is the worst of the others",
            }[name]
            notes.append(f"no sample in the {name!r} split of {len(empty)} of {classes} classes ({listed}): {what}")
    if task.labels and "validation" in task.splits:
        rows = len(task.splits["validation"])
        fine = [
            f"{entry.id or entry.name}.{field} ({getattr(entry.config, field):g})"
            for entry in inputs.recipe.stages
            for field in stage_named(entry.name).tolerances
            if 0.0 < (getattr(entry.config, field, None) or 0.0) < 1.0 / rows
        ]
        if fine:
            notes.append(
                f"{', '.join(fine)}: one of the {rows} validation samples is worth {1.0 / rows:.2g} of accuracy, so no "
                "loss that small can be measured and one sample decides; use more validation samples or larger values"
            )
    return tuple(notes)


def _check_later_phases(recipe: Recipe) -> None:
    """Refuses what would fail in the export or the benchmark only, after all the training.

    Raises:
        RecipeError: options of the export, or requirements, that do not fit the stages.
        ProviderError: an execution provider that is not here.
    """
    for entry in recipe.stages:
        judge = stage_named(entry.name).check_export
        if judge is not None:
            judge(entry.config, recipe.export)
    if recipe.export.generator:
        if recipe.benchmark.enabled:
            raise RecipeError(
                "export.generator: its speed depends on prompt and cache, `edgewright generate` measures it: set "
                "benchmark.enabled to false"
            )
    elif recipe.export.weights != "float32":
        raise RecipeError(
            f"export.weights is {recipe.export.weights}, which only a generator can have: set export.generator to true"
        )
    names = [entry.name for entry in recipe.stages]
    for field in recipe.require.of_stages:
        stage, _ = requirements()[field]
        if stage not in names:
            raise RecipeError(
                f"require.{field} cannot be met without the stage {stage!r}: add it, or drop the requirement"
            )
    if recipe.benchmark.enabled:
        import onnxruntime

        try:
            requested = provider_names(recipe.benchmark.providers)
        except InputError as error:
            raise RecipeError(f"benchmark.providers: {error}") from error
        missing = [name for name in requested if name not in onnxruntime.get_available_providers()]
        if missing:
            raise ProviderError(
                f"benchmark.providers asks for {missing[0]}, and this ONNX Runtime has "
                f"{', '.join(onnxruntime.get_available_providers())}: correct it, leave the timing out with "
                "`benchmark.enabled: false`, or install an ONNX Runtime with that provider"
            )


def example_inputs(recipe: Recipe, shape: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    """One batch: random numbers of `shape`, or the first test row of the recipe's task if that is None."""
    if shape is not None:
        return (torch.rand(shape, generator=torch.Generator().manual_seed(0)),)
    with seeded(recipe.seed):
        task = build_task(recipe.task.name, recipe.task.args, recipe.folder)
    return split_of(task, "test", needed_by="this command").batch([0]).inputs


def _weights_digest(path: Path, watch: Watch) -> str:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; `model.weights` is relative to the recipe's folder")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"the weights file {path} cannot be read: {error.strerror or error}") from None
    return watch.digest(path)
