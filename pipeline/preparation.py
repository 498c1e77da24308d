"""Everything that can be wrong with a recipe is found here, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgewright.edge_runtime.manifest import MANIFEST_FILE
from edgewright.models import registry
from edgewright.models.weights import load_weights

from .cache import Key, base_key, environment
from .checkpoint import BaseSpec
from .determinism import seeded
from .errors import ModelError, OutputError, ProviderError
from .recipe import Recipe, check_order
from .reproducibility import check_reproducible
from .sources import file_digests, sha256_of
from .stage import Json
from .stages import stage_named
from .task import Task, check_classes, data_digests, split_of
from .tasks import build_task, task_sources


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        recipe: checked.
        device: where stages compute.
        task: data, loss and metric.
        base: the model before all stages.
        base_key: its key.
        environment: versions and the like, part of every key.
    """

    recipe: Recipe
    device: torch.device
    task: Task
    base: BaseSpec
    base_key: Key
    environment: dict[str, Json]


def prepare(recipe: Recipe) -> Inputs:
    """Checks the recipe against this machine, the model's source, the weights file and the data.

    Raises:
        StageOrderError: the stages stand in an order that cannot work.
        ProviderError: the device is not there.
        ModelError: an unknown model, or weights that are not there.
        RecipeError: a stage names layers that the model does not have, or that it cannot work on.
        DataError: data missing, damaged or overlapping, or a split or class that a stage needs is empty.
    """
    check_order(recipe)
    device = device_named(recipe.device)
    base = BaseSpec(recipe.model.name, recipe.model.args)
    try:
        base_sources = file_digests(registry.sources(base.name, recipe.folder), recipe.folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    weights = None if recipe.model.weights is None else _weights_digest(recipe.resolve(recipe.model.weights))
    with seeded(recipe.seed):
        task = build_task(recipe.task.name, recipe.task.args, recipe.folder)
        check_splits(recipe, task)
        data = data_digests(task)
    check_stages(recipe, task)
    around = environment(device)
    key = base_key(
        base,
        base_sources,
        weights,
        BaseSpec(recipe.task.name, recipe.task.args),
        file_digests(task_sources(recipe.task.name, recipe.folder), recipe.folder),
        data,
        recipe.seed,
        around,
    )
    return Inputs(recipe, device, task, base, key, around)


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


def check_splits(recipe: Recipe, task: Task) -> None:
    """Refuses a task that lacks what the report or a stage reads.

    Raises:
        DataError: names the split or class, and who needs it.
    """
    split_of(task, "test", needed_by="the report")
    for entry in recipe.stages:
        stage = stage_named(entry.name)
        for split in stage.needed_splits(entry.config):
            split_of(task, split, needed_by=f"stage {entry.name!r}")
            if stage.per_class and split in ("train", "calibration"):
                check_classes(task, split, needed_by=f"stage {entry.name!r}")


def check_stages(recipe: Recipe, task: Task) -> None:
    """Shows the base model to every stage that has something to say about it before any compute.

    Raises:
        ModelError: see `build_named` and `check_model`.
        InputError: see `Stage.check`.
    """
    checked = [(stage_named(entry.name).check, entry.config) for entry in recipe.stages]
    if not any(check for check, _ in checked):
        return
    model = build_named(recipe)
    check_model(model, task, recipe.model.name)
    for check, config in checked:
        if check is not None:
            check(model, task, config)


def build_base(inputs: Inputs) -> nn.Module:
    """The model before all stages, see `build_named`, tried on the task's samples.

    Raises:
        ModelError: see `build_named`, `check_model` and `check_reproducible`.
    """
    model = build_named(inputs.recipe)
    check_model(model, inputs.task, inputs.base.name)
    other = build_named(inputs.recipe, inputs.recipe.seed + 1)
    check_reproducible(model, other, first_rows(inputs.task), inputs.base.name)
    return model


def build_named(recipe: Recipe, seed: int | None = None) -> nn.Module:
    """The recipe's model, with the user's weights if there are any, on the CPU in eval mode.

    Args:
        recipe: names it.
        seed: of the initial weights, default the recipe's.

    Raises:
        ModelError: it cannot be built, or the weights do not fit.
    """
    with seeded(recipe.seed if seed is None else seed):
        try:
            model = registry.build(recipe.model.name, dict(recipe.model.args), recipe.folder)
            if recipe.model.weights is not None:
                load_weights(model, recipe.resolve(recipe.model.weights))
        except ValueError as error:
            raise ModelError(str(error)) from error
    return model.to("cpu").eval()


def example_inputs(recipe: Recipe, shape: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    """One batch: random numbers of `shape`, or the first test row of the recipe's task if that is None."""
    if shape is not None:
        return (torch.rand(shape, generator=torch.Generator().manual_seed(0)),)
    with seeded(recipe.seed):
        task = build_task(recipe.task.name, recipe.task.args, recipe.folder)
    return split_of(task, "test", needed_by="this command").batch([0]).inputs


def first_rows(task: Task) -> tuple[Tensor, ...]:
    """Inputs of the first two test rows, or of the only one."""
    split = split_of(task, "test", needed_by="the report")
    return split.batch(list(range(min(2, len(split))))).inputs


@torch.no_grad()
def check_model(model: nn.Module, task: Task, name: str) -> None:
    """Runs two test rows through `model`.

    Raises:
        ModelError: it fails, or what it returns is no finite float [N, classes] tensor.
    """
    lazy = [key for key, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"{name}: the parameter {lazy[0]!r} has no shape yet (a Lazy module); run the model once on an "
            f"example "
            "in the function that builds it"
        )
    inputs = first_rows(task)
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    try:
        output = model(*inputs)
    except Exception as error:  # a user's forward may raise anything, and it is the user who has to know
        raise ModelError(
            f"{name} does not run on the inputs of the task {task.name!r} ({shapes}): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{name} returns a {type(output).__name__}; a classifier returns one tensor of logits [N, classes]: wrap it"
        )
    wanted = [len(inputs[0]), len(task.labels)]
    if list(output.shape) != wanted or not output.is_floating_point():
        raise ModelError(
            f"{name} returns {str(output.dtype).removeprefix('torch.')} {list(output.shape)} for inputs "
            f"{shapes}; "
            f"the task {task.name!r} has {len(task.labels)} labels, so logits {wanted} are needed: set its "
            f"number of "
            "classes under model.args, or correct the task's labels"
        )
    if not torch.isfinite(output).all():
        raise ModelError(
            f"{name} returns NaN or infinity for the first test rows: check its weights and the scale of the data"
        )


def _weights_digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; `model.weights` is relative to the recipe's folder")
    try:
        return sha256_of(path)
    except OSError as error:
        raise ModelError(f"the weights file {path} cannot be read: {error.strerror or error}") from None
