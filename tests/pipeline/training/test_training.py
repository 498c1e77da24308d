"""The training loop on data and networks that its defaults were not made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_residual, tiny_task
from torch import nn
from unlabelled import Embedding, Regression, network

from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.errors import ModelError, StageError
from edgewright.pipeline.stages.early_exit.stage import EarlyExitConfig
from edgewright.pipeline.stages.early_exit.stage import fit as add_exits
from edgewright.pipeline.stages.early_exit.training import ExitTrainingConfig, train_jointly
from edgewright.pipeline.stages.train import TrainConfig, fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Batch
from edgewright.pipeline.tasks.causal_lm import CausalLM
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.evaluation import evaluate
from edgewright.pipeline.training.training import TrainingConfig, train_model


def signals(rows: int = 480, classes: int = 4) -> ImageClassification:
    """Noisy sines [1, 64] whose frequency is the class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % classes
    phase = 6.28 * torch.rand(rows, 1, generator=generator)
    angle = 6.28 * (1.0 + 2.0 * y[:, None]) * torch.linspace(0, 1, 64) + phase
    x = torch.sin(angle) + 0.3 * torch.randn(rows, 64, generator=generator)
    return ImageClassification.from_arrays(x[:, None], y, [f"tone{i}" for i in range(classes)], name="signals")


class Convolutions(nn.Module):
    """One-dimensional convolutions without any normalisation, as strangers write them."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 7, 2, 3), nn.ReLU(), nn.Conv1d(16, 32, 5, 2, 2), nn.ReLU(), nn.Conv1d(32, 32, 5, 1, 2)
        )
        self.classify = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classify(torch.relu(self.features(x)).mean(2))
        return logits


@pytest.mark.slow
def test_joint_training_with_the_default_settings_does_not_ruin_a_network_without_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, task = Convolutions(), signals()
    train_model(model, task, TrainingConfig(epochs=12), FolderContext(tmp_path / "train"), "train")
    given = evaluate(model, task, "validation").accuracy
    assert given > 0.8
    training = {"epochs": 3, "learning_rate": 0.1}  # without a limit of the gradient this is undone
    config = EarlyExitConfig(at_macs=(0.3, 0.6), head_epochs=5, training=TrainingConfig(**training))
    result = add_exits(model, task, config, FolderContext(tmp_path / "exits"))
    assert not [note for note in result.notes if "undone" in note]
    assert result.metrics["plain_accuracy"] >= given - 0.02


@pytest.mark.slow
def test_the_defaults_learn_from_two_hundred_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tiny_task(rows={"train": 120, "validation": 40, "test": 40})
    result = fit(tiny_residual(), task, TrainConfig(), FolderContext(tmp_path))
    assert evaluate(result.model, task, "validation").accuracy >= 0.9
    assert {row["batch_size"] for row in result.metrics["log"]} == {8}
    assert any("8 rows" in note for note in result.notes)


def test_an_open_batch_size_leaves_enough_steps_and_a_given_one_is_obeyed() -> None:
    rule = TrainingConfig().rows_per_step
    assert [rule(rows) for rows in (3, 100, 200, 1000, 2048, 10**6)] == [8, 8, 12, 62, 128, 128]
    assert TrainingConfig(batch_size=128).rows_per_step(100) == 128


def test_few_steps_because_of_a_given_batch_size_are_said(tmp_path: Path) -> None:
    task = tiny_task(rows={"train": 40, "test": 8})
    result = fit(tiny_residual(), task, TrainConfig(batch_size=40, epochs=2), FolderContext(tmp_path))
    assert any("batch_size 40" in note and "2 steps" in note for note in result.notes)


@pytest.mark.parametrize("clip", [None, 1e6])
def test_divergence_stops_at_once_and_nothing_broken_is_saved(tmp_path: Path, clip: float | None) -> None:
    context = FolderContext(tmp_path)
    config = TrainConfig(learning_rate=1e8, epochs=4, batch_size=32, gradient_clip=clip)
    with pytest.raises(StageError, match=r"train: training diverged.* in epoch \d of 4, step \d") as caught:
        fit(Convolutions(), signals(200), config, context)
    assert "lower learning_rate (now 1e+08, try 1e+07)" in str(caught.value)
    assert "gradient_clip" in str(caught.value)
    state = context.load("train")
    assert state is None or all(torch.isfinite(x).all() for x in state.tensors.values())


def test_values_that_break_in_the_last_step_are_seen(tmp_path: Path) -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(144, 4)
            self.register_buffer("average", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.average.mul_(float("nan"))
            logits: torch.Tensor = self.layer(x.flatten(1))
            return logits

    with pytest.raises(StageError, match="'average' is no longer finite in epoch 1 of 2"):
        fit(Fragile(), tiny_task(rows={"train": 16}), TrainConfig(epochs=2), FolderContext(tmp_path))


class WithAuxiliary(nn.Module):
    """Returns a second output while it is trained, as networks with auxiliary classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(144, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x.flatten(1))
        logits: torch.Tensor = self.fc(y)
        return (logits, y) if self.training else logits


def test_more_than_logits_in_training_is_named(tmp_path: Path) -> None:
    wanted = r"WithAuxiliary returns a tuple of 2 \(float32 \[8, 4\], float32 \[8, 8\]\) in training mode"
    task, short = tiny_task(rows={"train": 16}), TrainConfig(epochs=1)
    with pytest.raises(ModelError, match=wanted):
        fit(WithAuxiliary(), task, short, FolderContext(tmp_path / "plain"))
    exits = MultiExit(WithAuxiliary().eval(), [HeadSpec("body", 8)], [2], 4, "max_probability")
    with pytest.raises(ModelError, match=wanted):
        config = ExitTrainingConfig(training=TrainingConfig(epochs=1))
        train_jointly(exits, task, config, FolderContext(tmp_path / "exits"))


def test_unscaled_inputs_are_named_as_the_cause(tmp_path: Path) -> None:
    y = torch.arange(64) % 4
    task = ImageClassification({"train": (1e20 * torch.randn(64, 1, 64), y)}, list("abcd"))
    with pytest.raises(StageError, match=r"scale the inputs to about -1 \.\.\. 1 \(they reach "):
        fit(Convolutions(), task, TrainConfig(), FolderContext(tmp_path))


def test_a_stage_keeps_its_own_training_defaults_where_a_recipe_gives_a_part() -> None:
    own = EarlyExitConfig().training
    assert own.learning_rate == 0.01
    part = EarlyExitConfig.model_validate({"training": {"epochs": 3}}).training
    assert (part.epochs, part.learning_rate) == (3, own.learning_rate)
    assert EarlyExitConfig.model_validate({"training": {"learning_rate": 0.2}}).training.epochs == own.epochs


def test_plain_momentum_is_a_choice(tmp_path: Path) -> None:
    """Two steps on the whole split: after the second, Nesterov's looks ahead and the plain one does not."""
    task = tiny_task(rows={"train": 8})
    found = {}
    for nesterov in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(task.splits["train"].batch([0]).inputs[0].numel(), len(task.labels))
        )
        by_hand = [p.detach().clone().requires_grad_() for p in model.parameters()]
        options = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1, "weight_decay": 0.0, "schedule": "constant"}
        config = TrainingConfig(**options, nesterov=nesterov, gradient_clip=None)  # type: ignore[arg-type]
        train_model(model, task, config, FolderContext(tmp_path / str(nesterov)), "t")
        batch, speed = task.splits["train"].batch(range(8)), [torch.zeros_like(p) for p in by_hand]
        for _ in range(2):
            loss = task.loss(nn.functional.linear(batch.inputs[0].flatten(1), *by_hand), batch.targets)
            gradients = torch.autograd.grad(loss, by_hand)
            with torch.no_grad():
                for p, g, v in zip(by_hand, gradients, speed, strict=True):
                    v.mul_(0.9).add_(g)
                    p -= 0.1 * (g + 0.9 * v if nesterov else v)
        for ours, expected in zip(model.parameters(), by_hand, strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)
        found[nesterov] = by_hand[0].detach()
    assert not torch.allclose(found[True], found[False], atol=1e-3)


def test_adamw_without_a_rate_takes_one_that_suits_it() -> None:
    assert TrainingConfig(optimizer="adamw").learning_rate == 0.001
    assert TrainingConfig(optimizer="adamw", learning_rate=0.02).learning_rate == 0.02
    assert TrainingConfig(optimizer="sgd").learning_rate == 0.05


def test_a_network_that_has_not_learned_is_pointed_out(tmp_path: Path) -> None:
    task = tiny_task(rows={"train": 64, "test": 8})
    still = fit(Convolutions(), signals(80), TrainConfig(learning_rate=0.0, epochs=1), FolderContext(tmp_path / "0"))
    assert any("hardly learned" in note and "guessing gives 1.3863" in note for note in still.notes)
    moving = fit(tiny_residual(), task, TrainConfig(epochs=6), FolderContext(tmp_path / "1"))
    assert not any("hardly learned" in note for note in moving.notes)


@pytest.mark.parametrize(
    "task", [Regression(), Embedding(), CausalLM({"train": torch.arange(320).reshape(40, 8) % 7}, 7)]
)
def test_notes_never_call_the_loss_of_a_task_without_classes_on_shapes_of_their_own(tmp_path: Path, task) -> None:
    model = nn.Embedding(7, 7) if isinstance(task, CausalLM) else network()
    still = fit(model, task, TrainConfig(epochs=2, learning_rate=0.0), FolderContext(tmp_path / "0"))
    assert any("training loss has hardly fallen" in note for note in still.notes)
    moving = fit(model, task, TrainConfig(epochs=8, learning_rate=0.1), FolderContext(tmp_path / "1"))
    assert not any("hardly" in note for note in moving.notes)


def test_a_batch_larger_than_the_split_is_one_step_an_epoch_on_all_of_it(tmp_path: Path) -> None:
    task, config = tiny_task(rows={"train": 6}), TrainingConfig(epochs=2, batch_size=64, schedule="constant")
    seen: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(len(batch.targets))
        return task.loss(model(*batch.inputs), batch.targets)

    model, before = tiny_residual(), tiny_residual().state_dict()
    log = train_model(model, task, config, FolderContext(tmp_path), "train", loss)
    assert seen == [6, 6] and [row["learning_rate"] for row in log] == [0.05, 0.05]
    assert not torch.equal(model.state_dict()["fc.weight"], before["fc.weight"])
    cosine = train_model(
        tiny_residual(), task, TrainingConfig(epochs=2, batch_size=64), FolderContext(tmp_path / "cosine"), "train"
    )
    assert [row["learning_rate"] for row in cosine] == [pytest.approx(0.05), pytest.approx(0.025)]
