"""Smoothing the labels of whatever loss a task has; the right values are torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_residual, tiny_task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss
from unlabelled import Regression, network

from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.errors import RecipeError
from edgewright.pipeline.stages.class_aware_pruning.loss import modified_loss
from edgewright.pipeline.stages.early_exit.training import ExitTrainingConfig, exit_loss, exit_weights, train_jointly
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.causal_lm import CausalLM
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.label_smoothing import smoothed_loss
from edgewright.pipeline.training.training import TrainingConfig, task_loss, train_model

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5])


class Own(ImageClassification):
    """A loss of its own."""

    def __init__(self, loss: Any) -> None:
        super().__init__({"train": (torch.randn(4, 4), torch.arange(4))}, list("abcd"))
        self.own = loss

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = self.own(logits, targets)
        return value


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([0, 3, -100, 1, 2, 3])


@pytest.mark.parametrize(
    ("own", "right"),
    [
        (lambda x, y: cross_entropy(x, y), lambda x, y: cross_entropy(x, y, label_smoothing=0.1)),
        (
            lambda x, y: cross_entropy(x, y, weight=WEIGHTS),
            lambda x, y: cross_entropy(x, y, weight=WEIGHTS, label_smoothing=0.1),
        ),
        (nn.CrossEntropyLoss(weight=WEIGHTS), nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)),
        (
            lambda x, y: nll_loss(log_softmax(x, 1), y, weight=WEIGHTS),
            lambda x, y: cross_entropy(x, y, weight=WEIGHTS, label_smoothing=0.1),
        ),
        (
            lambda x, y: 2 * cross_entropy(x, y, reduction="sum") + x.square().mean(),
            lambda x, y: 2 * cross_entropy(x, y, reduction="sum", label_smoothing=0.1) + x.square().mean(),
        ),
    ],
)
def test_a_share_goes_to_the_cross_entropy_inside_the_tasks_own_loss(own: Any, right: Any) -> None:
    torch.testing.assert_close(smoothed_loss(Own(own), LOGITS, TARGETS, 0.1), right(LOGITS, TARGETS))
    torch.testing.assert_close(smoothed_loss(Own(own), LOGITS, TARGETS, 0.0), own(LOGITS, TARGETS))


@pytest.mark.parametrize("window", [7, 8])  # as long as the vocabulary: the axes could be taken for each other
def test_sequences_and_their_ends(window: int) -> None:
    task = CausalLM({"train": torch.arange(4 * window).reshape(4, window) % 7}, 7)
    batch = task.splits["train"].batch([0, 1])
    torch.manual_seed(0)
    model = nn.Embedding(7, 7)
    right = cross_entropy(model(batch.inputs[0]).flatten(0, 1), batch.targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(task_loss(task, TrainingConfig(label_smoothing=0.1))(model, batch), right)


@pytest.mark.parametrize("task", [Regression(), Own(lambda x, y: x.sigmoid()[:, 0].mean())])
def test_a_loss_without_classes_is_refused(task: Any) -> None:
    with pytest.raises(RecipeError, match=r"label_smoothing is 0.1, and the loss of the task .* calls no .*cross_ent"):
        smoothed_loss(task, torch.zeros(2, 2), torch.zeros(2, 2), 0.1)


def test_a_loss_that_smooths_by_itself_is_not_smoothed_twice() -> None:
    with pytest.raises(RecipeError, match="smooths its targets already"):
        smoothed_loss(Own(nn.CrossEntropyLoss(label_smoothing=0.2)), LOGITS, TARGETS, 0.1)


def test_every_training_smooths(tmp_path: Path) -> None:
    """Half of the mass on all classes shows in the first loss of each."""
    task, config = tiny_task(rows={"train": 8}), TrainingConfig(epochs=1, batch_size=8, label_smoothing=0.5)
    batch = task.splits["train"].batch(range(8))
    model = tiny_residual().train()
    right = cross_entropy(model(*batch.inputs), batch.targets, label_smoothing=0.5)
    torch.testing.assert_close(modified_loss(task, config, 0.0, 0.0, 1)(tiny_residual().train(), batch), right)
    log = train_model(tiny_residual(), task, config, FolderContext(tmp_path / "plain"), "train")
    assert log[0]["loss"] == pytest.approx(float(right), rel=1e-5)
    network = MultiExit(tiny_residual(), [HeadSpec("blocks.0", 8)], [4], 4, "max_probability").train()
    joint = ExitTrainingConfig(training=config)
    heads, end = network.all_logits(*batch.inputs)
    exits = exit_loss([heads], end, batch.targets, exit_weights(1), "max_probability", joint)
    log = train_jointly(network, task, joint, FolderContext(tmp_path / "joint"))
    assert log[0]["loss"] == pytest.approx(float(right + exits), rel=1e-4)


def test_regression_trains_and_is_told_nothing_of_guesses(tmp_path: Path) -> None:
    log = train_model(network(), Regression(), TrainingConfig(epochs=3), FolderContext(tmp_path), "train")
    assert log[-1]["loss"] < log[0]["loss"]
