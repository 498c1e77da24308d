"""The `train` stage: ordinary training, from scratch or from the weights at hand. It changes values only."""

from __future__ import annotations

from torch import nn

from ..stage import Context, Edit, Stage, StageResult
from ..task import Task
from ..training import TrainingConfig, train_model


class TrainConfig(TrainingConfig):
    """How to train."""


def fit(model: nn.Module, task: Task, config: TrainConfig, context: Context) -> StageResult:
    """Trains every parameter of `model` in place on the train split.

    Raises:
        StageError: the loss is not finite.
    """
    log = train_model(model, task, config, context, name="train")
    notes = ("training changes values, not structure: MACs and parameters stay",)
    return StageResult(model, Edit("train"), metrics={"log": log}, notes=notes)


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Returns `model`: the structure is unchanged."""
    del edit
    return model


STAGE = Stage(
    name="train",
    config=TrainConfig,
    fit=fit,
    rebuild=rebuild,
    forbids={
        "early_exit": "a network with exits answers decisions, not logits to train on; early_exit trains the "
        "network "
        "and its heads itself, so put `train` before it"
    },
    splits=("train",),
)
