"""The `train` stage: ordinary training, from scratch or from the weights at hand. It changes values only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..stage import Context, Edit, Json, Preview, Stage, StageResult
from ..task import Task
from ..tasks.image_classification import ImageClassification
from ..training.training import FEW_STEPS, LARGEST_BATCH, TrainingConfig, train_model

_LEARNED = 0.97  # of the loss of a guess, or of the first epoch: above it, nothing has been learned


class TrainConfig(TrainingConfig):
    """How to train."""


def fit(model: nn.Module, task: Task, config: TrainConfig, context: Context) -> StageResult:
    """Trains every parameter of `model` in place on the train split.

    Raises:
        StageError: training diverges.
    """
    log = train_model(model, task, config, context, name="train")
    notes = ["training changes values, not structure: MACs and parameters stay", *_doubts(task, config, log)]
    return StageResult(model, Edit("train"), metrics={"log": log}, notes=tuple(notes))


def _doubts(task: Task, config: TrainConfig, log: Sequence[Mapping[str, Json]]) -> Iterator[str]:
    """What the user should know before the result is built upon."""
    rows = len(task.splits["train"])
    batch = config.rows_per_step(rows)
    steps = config.epochs * max(1, rows // batch)
    if config.batch_size is None and batch < LARGEST_BATCH:
        yield (
            f"the {rows} training samples are few: {batch} rows a step in place of {LARGEST_BATCH}, {steps} steps in "
            "all; batch_size sets another number"
        )
    elif config.batch_size is not None and 0 < steps < FEW_STEPS:
        yield (
            f"batch_size {config.batch_size} on {rows} training samples leaves {steps} steps in all, hardly enough to "
            "learn from: lower it, leave it out, or raise epochs"
        )
    if not log:
        return
    first, last, guess = log[0]["loss"], log[-1]["loss"], _guess(task)
    helps = (
        "raise epochs, try optimizer adamw, another learning_rate or inputs scaled to about -1 ... 1, or give the "
        "network normalisation layers"
    )
    if guess is not None and last > _LEARNED * guess:
        yield (
            f"the network has hardly learned: its training loss is {last:.4f} after {len(log)} epochs, and guessing "
            f"gives {guess:.4f}: {helps}"
        )
    elif guess is None and len(log) > 1 and last > first - (1.0 - _LEARNED) * abs(first):
        yield (
            f"the training loss has hardly fallen: {first:.4g} in the first of {len(log)} epochs and {last:.4g} in the "
            f"last. Unless the weights were good before, {helps}"
        )


def _guess(task: Task) -> float | None:
    """Loss of all classes alike, with smoothed labels too; None where the task's loss may be anything.

    Worked out here: a task's own loss may take shapes that only its author knows.
    """
    known = isinstance(task, ImageClassification) and type(task).loss is ImageClassification.loss
    return math.log(len(task.labels)) if known else None


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Returns `model`: the structure is unchanged."""
    del edit
    return model


def preview(model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None, config: TrainConfig) -> Preview:
    """What is trained, and for how long."""
    del inputs
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = None if task is None or "train" not in task.splits else len(task.splits["train"])
    on = "" if rows is None else f" on {rows} samples"
    return Preview(
        f"trains {trained:,} parameters for {config.epochs} epochs{on}",
        figures={"parameters": trained, "epochs": config.epochs, "samples": rows},
    )


STAGE = Stage(
    name="train",
    config=TrainConfig,
    fit=fit,
    rebuild=rebuild,
    splits=("train",),
    dense=True,
    preview=preview,
)
