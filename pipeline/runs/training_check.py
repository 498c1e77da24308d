"""Whether a model can be trained as a recipe asks: one forward in training mode and one loss, before any compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.export.graph.leaves import described
from edgewright.export.source import answers_of
from edgewright.models.sources.python_source import place_of

from ..errors import EdgewrightError, ModelError, RecipeError
from ..task import Batch, Task, named_outputs, split_of
from ..training.label_smoothing import smoothed_loss
from ..training.model_output import training_logits
from ..training.training import TrainingConfig
from .failing_module import Running, normalises_one_value, watched, where


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a recipe.

    Attributes:
        place: of its settings in the recipe, e.g. ``train``, or the id of a stage and ``.retrain``.
        config: the settings.
        samples: in the train split at that point.
    """

    place: str
    config: TrainingConfig
    samples: int

    @property
    def rows(self) -> int:
        """Rows of a step: all samples where the split has fewer than a batch."""
        return min(self.config.rows_per_step(self.samples), self.samples)


def check_training(model: nn.Module, task: Task, planned: Sequence[PlannedTraining], name: str) -> None:
    """Runs a step's forward and loss on one or two train rows, as small as a step will be.

    Args:
        model: left in training mode, with what a forward changes changed: a copy that nobody needs afterwards.
        task: gives rows, augmentation and loss.
        planned: all trainings; one that does nothing is not tried.
        name: the model's, as the recipe calls it.

    Raises:
        ModelError: the model fails in training mode, or what it returns there is not what it returns in eval mode.
        RecipeError: a batch of one row that a norm over the batch cannot take, or labels that cannot be smoothed.
    """
    tried: set[tuple[int, float]] = set()
    for training in planned:
        smallest = min(2, training.rows)
        if training.config.epochs and (smallest, training.config.label_smoothing) not in tried:
            tried.add((smallest, training.config.label_smoothing))
            _try(model, task, training, smallest, name)


def _try(model: nn.Module, task: Task, training: PlannedTraining, rows: int, name: str) -> None:
    split = split_of(task, "train", needed_by=training.place)
    batch = task.augment(split.batch(list(range(rows))), torch.Generator().manual_seed(0))
    running: Running = []
    model.train()
    try:
        with watched(model, running):
            output = model(*batch.inputs)
    except Exception as error:  # a user's forward may raise anything, and it is the user who has to know
        raise _failed(error, running, training, rows, name) from error
    specs = answers_of(task)
    logits = training_logits(model, output, specs)
    with torch.no_grad():
        wanted = named_outputs(model.eval()(*batch.inputs), specs)
    if len(specs) == 1 and not _alike(logits, wanted, rows, len(task.labels)):
        raise ModelError(
            f"{name} returns {described(output)} in training mode and {described(wanted)} in eval mode, for the same "
            f"{rows} row(s): both have to be alike. If it is wrapped because the network returns a tensor in one mode "
            "and several in the other, the wrapper's forward is `out = self.model(*inputs)` and `return out if "
            "isinstance(out, torch.Tensor) else out[0]`: out[0] of a tensor is its first row"
        )
    _check_loss(task, logits, batch, training)


def _alike(output: Tensor, wanted: Tensor, rows: int, labels: int) -> bool:
    if labels:
        return list(output.shape) == [rows, labels]
    return output.dim() == wanted.dim() and len(output) == rows


def _failed(error: Exception, running: Running, training: PlannedTraining, rows: int, name: str) -> EdgewrightError:
    found = f"{type(error).__name__}: {error}{where(running, error)}"
    if rows > 1 or not normalises_one_value(error):
        return ModelError(f"{name} runs in eval mode, and not on {rows} row(s) in training mode: {found}")
    if training.samples == 1:
        return RecipeError(
            f"{training.place}: the train split has one sample, which {name} cannot be trained on: {found}"
        )
    return RecipeError(
        f"{training.place}.batch_size is 1, and {name} cannot be trained on one row at a time: {found}. Set it to 2 or "
        "more, best 8 or more, leave it out, or build the model with norms over each row (GroupNorm, LayerNorm)"
    )


def _check_loss(task: Task, logits: Any, batch: Batch, training: PlannedTraining) -> None:
    what = f"the loss of the task {task.name!r}"
    try:
        loss: Any = smoothed_loss(task, logits, batch.targets, training.config.label_smoothing)
    except RecipeError as error:
        raise RecipeError(f"{training.place}: {error}") from None
    except Exception as error:  # as above
        raise ModelError(
            f"{what} fails on what the model returns, {described(logits)}, and targets {described(batch.targets)}"
            f"{place_of(error)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelError(f"{what} is {described(loss)}, and training needs the mean over the batch, one number")
    if not loss.requires_grad:
        raise ModelError(
            f"{what} has no gradient, so nothing can be trained: compute it from the model's output with torch, "
            "without `.detach()`, `.item()`, argmax or no_grad, and leave at least one parameter with requires_grad"
        )
