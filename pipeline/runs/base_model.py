"""The model before all stages: built as the recipe says, and tried on the task's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn

from edgewright.models import registry
from edgewright.models.sources.folding import Folds, find_folds, fold
from edgewright.models.sources.module_state import scripted_module
from edgewright.models.sources.weights import load_weights

from ..errors import ModelError
from ..recipe.recipe import Recipe
from ..stage import Json, Progress
from ..stage_registry import stage_named
from ..task import ReadsModel, Task
from .determinism import seeded
from .inputs import Inputs
from .model_check import check_exportable, check_generates, check_model, first_rows
from .reproducibility import check_reproducible


@dataclass(frozen=True)
class Base:
    """The model before all stages.

    Attributes:
        model: on the CPU in eval mode.
        folds: what was folded in it.
        late: what its first call registers (`late_tensors`).
        notes: what the user should know of it.
    """

    model: nn.Module
    folds: Folds
    late: dict[str, Json]
    notes: tuple[str, ...]


def build_base(inputs: Inputs, progress: Progress) -> Base:
    """The model before all stages, see `build_named`, tried on the task's samples; reads every sample once.

    What can be folded in it is folded, unless trainings come first, see `trainings_first`.

    Raises:
        ModelError: see `build_named`, `check_model`, `check_reproducible` and `check_exportable`.
        DataError: a sample that cannot be read; names it.
    """
    name, recipe = inputs.base.name, inputs.recipe
    notes: list[str] = []
    rows = first_rows(inputs.task)
    model, folds = build_named(recipe, notes=notes), Folds()
    if not trainings_first(recipe):
        model, folds = folded(model, recipe, rows)
        notes += folds.notes
    check_model(model, inputs.task, name)
    other = fold(build_named(recipe, recipe.seed + 1), folds)
    late = check_reproducible(model, other, rows, name)
    if recipe.export.generator:
        check_generates(model, inputs.task, name)
        return Base(model, folds, late, tuple(notes))
    alone = recipe.benchmark.enabled or not any(stage_named(entry.name).branches for entry in recipe.stages)
    batch = recipe.export.batch
    check_exportable(model, inputs.task, name, dynamic=batch == "compact" or (batch != "single" and alone))
    for split_name, split in inputs.task.splits.items():
        read_all = getattr(split, "read_all", None)
        if read_all is not None:
            read_all(progress, f"reading every sample of {split_name}")
    return Base(model, folds, late, tuple(notes))


def trainings_first(recipe: Recipe) -> int:
    """How many trainings the recipe begins with.

    They want the branches of a network that brings a method to join them, and the norms in these; what can be folded is
    folded behind them.
    """
    return sum(1 for _ in takewhile(lambda entry: stage_named(entry.name).dense, recipe.stages))


def folded(model: nn.Module, recipe: Recipe, rows: Sequence[Tensor]) -> tuple[nn.Module, Folds]:
    """`model` with everything folded that can be, see `models.sources.folding`, if the recipe wants that.

    Args:
        model: eval mode, on the CPU; changed in place.
        recipe: says whether.
        rows: inputs of some rows, to try it on.
    """
    if not recipe.model.fold:
        return model, Folds()
    folds = find_folds(model, rows)
    return fold(model, folds), folds


def bound_to_model(task: Task, recipe: Recipe) -> Task:
    """`task` as it is for the recipe's model, if it asks for that (`ReadsModel`).

    Raises:
        ModelError: see `build_named` and `ReadsModel.for_model`.
    """
    if not (isinstance(task, ReadsModel) and task.reads_model):
        return task
    return task.for_model(build_named(recipe))


def build_named(recipe: Recipe, seed: int | None = None, notes: list[str] | None = None) -> nn.Module:
    """The recipe's model, with the user's weights if there are any, on the CPU in eval mode.

    Args:
        recipe: names it.
        seed: of the initial weights, default the recipe's.
        notes: gets what the user should know of the model and its weights, if it is given.

    Raises:
        ModelError: it cannot be built, or the weights do not fit.
    """
    with seeded(recipe.seed if seed is None else seed):
        try:
            model = registry.build(recipe.model.name, dict(recipe.model.args), recipe.folder, notes)
            if recipe.model.weights is not None:
                loaded = load_weights(model, recipe.resolve(recipe.model.weights))
                if notes is not None:
                    notes += loaded.notes
        except ValueError as error:
            raise ModelError(str(error)) from error
    scripted = scripted_module(model)
    if scripted is not None:
        raise ModelError(f"{recipe.model.name}: {scripted}")
    return model.to("cpu").eval()
