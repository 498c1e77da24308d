"""The model before all stages: built as the recipe says, and tried on the task's samples."""

from __future__ import annotations

from torch import nn

from edgewright.models import registry
from edgewright.models.sources.module_state import scripted_module
from edgewright.models.sources.weights import load_weights

from ..errors import ModelError
from ..recipe.recipe import Recipe
from ..stage import Json, Progress
from ..stage_registry import stage_named
from .determinism import seeded
from .inputs import Inputs
from .model_check import check_exportable, check_generates, check_model, first_rows
from .reproducibility import check_reproducible


def build_base(inputs: Inputs, progress: Progress) -> tuple[nn.Module, dict[str, Json], tuple[str, ...]]:
    """The model before all stages, see `build_named`, tried on the task's samples; reads every sample once.

    Returns:
        The model, what its first call registers (`late_tensors`), and what the user should know of it.

    Raises:
        ModelError: see `build_named`, `check_model`, `check_reproducible` and `check_exportable`.
        DataError: a sample that cannot be read; names it.
    """
    name, recipe = inputs.base.name, inputs.recipe
    notes: list[str] = []
    model = build_named(recipe, notes=notes)
    check_model(model, inputs.task, name)
    late = check_reproducible(model, build_named(recipe, recipe.seed + 1), first_rows(inputs.task), name)
    if recipe.export.generator:
        check_generates(model, inputs.task, name)
        return model, late, tuple(notes)
    alone = recipe.benchmark.enabled or not any(stage_named(entry.name).branches for entry in recipe.stages)
    batch = recipe.export.batch
    check_exportable(model, inputs.task, name, dynamic=batch == "compact" or (batch != "single" and alone))
    for split_name, split in inputs.task.splits.items():
        read_all = getattr(split, "read_all", None)
        if read_all is not None:
            read_all(progress, f"reading every sample of {split_name}")
    return model, late, tuple(notes)


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
