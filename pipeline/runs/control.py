"""The control row: the same architecture, not compressed but built small, trained from scratch to the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..analysis import cost
from ..errors import RecipeError
from ..recipe.recipe import ControlSpec, ModelSpec, Recipe, Requirements, StageEntry
from ..stage_registry import TRAINING, stage_named
from .base_model import build_named, folded
from .inputs import Inputs

CONTROL = "control"
"""Id of the control's step in a report."""

_HALVINGS = 12


def check_control(inputs: Inputs, spec: ControlSpec) -> None:
    """Builds the control's narrowest and widest network, to learn before any compute whether that works.

    Raises:
        RecipeError: the model has no such argument, cannot be built with it, or its MACs do not grow with it.
    """
    low, high = spec.between
    try:
        smallest, largest = (_macs(inputs, spec, value) for value in (low, high))
    except Exception as error:  # a user's model may fail in any way with a width it was not made for
        raise RecipeError(
            f"control.argument: {inputs.recipe.model.name} does not work with {spec.argument} from {low:g} to "
            f"{high:g}: {error}"
        ) from error
    if not smallest < largest:
        raise RecipeError(
            f"control: {spec.argument} at {low:g} gives {smallest} MACs and at {high:g} {largest}: it must make the "
            "model larger; correct control.argument or control.between"
        )


def control_recipe(inputs: Inputs, spec: ControlSpec, macs: float) -> Recipe:
    """The recipe of the control: the base model at the width whose MACs are nearest to `macs`, and one training.

    Where stages keep some classes only, so does the control, before it is trained; the classifier's rows of the others
    count in the search for the width.

    Args:
        inputs: of the run.
        spec: which argument of the model to vary, and how to train.
        macs: of one row, to be met.

    Raises:
        RecipeError: the model's MACs do not grow with the argument, or stay above `macs`.
    """
    low, high = spec.between
    smallest, largest = (_macs(inputs, spec, value) for value in (low, high))
    if not smallest < largest or macs < 0.9 * smallest:
        raise RecipeError(
            f"control: {spec.argument} from {low:g} to {high:g} gives {smallest} to {largest} MACs, "
            f"the compressed model has {macs:.0f}: widen control.between, or leave the control out"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _macs(inputs, spec, middle) < macs:
            low = middle
        else:
            high = middle
    value = min((low, high), key=lambda v: abs(_macs(inputs, spec, v) - macs))
    recipe = inputs.recipe
    args = {**recipe.model.args, spec.argument: _argument(spec, value)}
    model = ModelSpec(name=recipe.model.name, args=args, fold=recipe.model.fold)
    training = StageEntry(name=TRAINING, id=CONTROL, config=spec.training)
    changes = {
        "model": model,
        "stages": (*_same_classes(recipe), training),
        "control": None,
        "require": Requirements(),
    }
    return recipe.model_copy(update=changes)


def _same_classes(recipe: Recipe) -> tuple[StageEntry, ...]:
    """Stages that leave a model the classes that the recipe's stages leave, and everything else as it is."""
    found: list[StageEntry] = []
    for entry in recipe.stages:
        stage = stage_named(entry.name)
        if stage.classes is not None and stage.classes_alone is not None and stage.classes(entry.config):
            place = f"{CONTROL}-{len(found) + 1}"
            found.append(StageEntry(name=entry.name, id=place, config=stage.classes_alone(entry.config)))
    return tuple(found)


def _macs(inputs: Inputs, spec: ControlSpec, value: float) -> int:
    split = inputs.task.splits["test"]
    rows = split.batch([0]).inputs
    return cost.count(_built(inputs.recipe, spec, value, rows), rows).macs


def _argument(spec: ControlSpec, value: float) -> int | float:
    """What the model is given for `value`."""
    low, high = spec.between
    whole = low.is_integer() and high.is_integer() and high - low != 1.0
    return round(value) if whole else round(value, 4)


def _built(recipe: Recipe, spec: ControlSpec, value: float, rows: Sequence[Tensor]) -> nn.Module:
    args: dict[str, Any] = {**recipe.model.args, spec.argument: _argument(spec, value)}
    asked = ModelSpec(name=recipe.model.name, args=args, fold=recipe.model.fold)
    recipe = recipe.model_copy(update={"model": asked})
    return folded(build_named(recipe), recipe, rows)[0]
