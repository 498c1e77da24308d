"""The `train` stage: ordinary training, from scratch or from the weights at hand. It changes values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..stage import Context, Edit, Json, Stage, StageResult
from ..task import Task
from ..training import FEW_STEPS, LARGEST_BATCH, TrainingConfig, train_model

_LEARNED = 0.97  # of the loss of a guess: above it, nothing has been learned


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
    classes = len(task.labels)
    guess = float(task.loss(torch.zeros(classes, classes), torch.arange(classes)))
    if log and log[-1]["loss"] > _LEARNED * guess:
        yield (
            f"the network has hardly learned: its training loss is {log[-1]['loss']:.4f} after {len(log)} epochs, and "
            f"guessing gives {guess:.4f}: raise epochs, try optimizer adamw, another learning_rate or inputs scaled to "
            "about -1 ... 1, or give the network normalisation layers"
        )


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Returns `model`: the structure is unchanged."""
    del edit
    return model


STAGE = Stage(
    name="train",
    config=TrainConfig,
    fit=fit,
    rebuild=rebuild,
    splits=("train",),
)
