from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pruning_models
import pytest
import torch
from pydantic import ValidationError
from tiny import TinyResidual, tiny_residual, tiny_task, tiny_transformer
from torch import nn

from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.errors import DataError, StageError
from edgewright.pipeline.stage import Edit, State
from edgewright.pipeline.stages.class_aware_pruning import CRITERIA, STAGE, ClassAwarePruningConfig, fit, rebuild
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Batch, Task
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.splits import TensorSplit
from edgewright.pipeline.training.evaluation import evaluate
from edgewright.pipeline.training.training import TrainingConfig, train_model

SHORT = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}
TARGET: dict[str, Any] = {
    "target_mac_reduction": 0.4,
    "max_frac_per_iter": 0.3,
    "max_drop": 1.0,
    "lambda1": 1e-5,
    "lambda_o": 1e-3,
    "retrain": SHORT,
}
_TRAINED: dict[str, nn.Module] = {}


def trained(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """A model with 6 epochs of training, made once per run of the tests."""
    if build.__name__ not in _TRAINED:
        model = build()
        adam = TrainingConfig(epochs=6, batch_size=32, learning_rate=5e-3, optimizer="adamw")
        train_model(model, tiny_task(), adam, FolderContext(folder / "before"), "before")
        _TRAINED[build.__name__] = model
    return copy.deepcopy(_TRAINED[build.__name__])


def config(**fields: Any) -> ClassAwarePruningConfig:
    return ClassAwarePruningConfig(**{**TARGET, **fields})


def macs(model: nn.Module) -> int:
    return count(model, (torch.zeros(1, 1, 12, 12),)).macs


@pytest.mark.slow
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("build", [tiny_residual, tiny_transformer])
def test_every_criterion_reaches_the_target(criterion: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = trained(build, tmp_path)
    dense = copy.deepcopy(model)
    share = 0.4 if build is tiny_residual else 0.25
    result = fit(
        model, tiny_task(), config(criterion=criterion, target_mac_reduction=share), FolderContext(tmp_path / "fit")
    )
    found = 1 - macs(result.model) / macs(dense)
    assert share <= found < share + 0.06
    assert result.metrics["stopped"] == "target reached"
    steps = [macs(dense), *(row["macs"] for row in result.metrics["iterations"])]
    assert all(a > b for a, b in itertools.pairwise(steps)), "MACs fall strictly"
    assert steps[-1] == result.metrics["macs"] == macs(result.model)
    rebuilt = rebuild(dense, Edit(STAGE.name, copy.deepcopy(dict(result.edit.data))))
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = tiny_task().splits["test"].batch(list(range(16))).inputs[0]
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), result.model(x))
    for path, filters in result.metrics["iterations"][-1]["filters"].items():
        layer = result.model.get_submodule(path)
        assert filters == getattr(layer, "out_channels", getattr(layer, "out_features", None))
        assert f"scores.{path}" in result.artifacts


def test_accuracy_holds_at_three_times_fewer_macs(tmp_path: Path) -> None:
    task, model = tiny_task(), trained(tiny_residual, tmp_path)
    before = evaluate(model, task, "test").accuracy
    wanted = config(
        criterion="class_count_fisher",
        target_mac_reduction=0.66,
        min_width=0.1,
        finetune={"epochs": 4, "batch_size": 32, "learning_rate": 0.02},
    )
    result = fit(model, task, wanted, FolderContext(tmp_path / "fit"))
    after = evaluate(result.model, task, "test").accuracy
    assert before > 0.9 and after > before - 0.05, (before, after)


def test_faithful_mode_removes_what_few_classes_need_and_stops(tmp_path: Path) -> None:
    model = trained(tiny_residual, tmp_path)
    dead = [1, 4, 5, 9]
    with torch.no_grad():
        norm = model.get_submodule("blocks.1.bn1")
        norm.weight[dead], norm.bias[dead] = 0.0, -0.5
    result = fit(
        model, tiny_task(), config(target_mac_reduction=None, threshold_frac=0.01), FolderContext(tmp_path / "fit")
    )
    assert result.metrics["stopped"] == "no candidates"
    first = result.metrics["iterations"][0]
    assert first["threshold"] == pytest.approx(0.04) and first["removed"]["blocks.1.conv1"] >= len(dead)
    kept = {i for start, stop in result.edit.data["keep"]["blocks.1.conv1"]["out"] for i in range(start, stop)}
    assert not kept & set(dead)
    assert result.artifacts["class_counts.blocks.1.conv1"].shape == (4, len(kept))


def test_iteration_below_the_floor_is_undone(tmp_path: Path) -> None:
    model = trained(tiny_residual, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # a learning rate that destroys the model
    ruin = {
        "epochs": 1,
        "batch_size": 32,
        "learning_rate": 5.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
    }
    result = fit(model, tiny_task(), config(max_drop=0.01, retrain=ruin), FolderContext(tmp_path / "fit"))
    assert result.metrics["stopped"].startswith("accuracy below the floor (drop ")
    assert [row["kept"] for row in result.metrics["iterations"]] == [False]
    assert result.edit.data == {"keep": {}, "attributes": {}}
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    assert any("nothing was removed" in note for note in result.notes)
    assert result.metrics["accuracy"] == result.metrics["baseline_accuracy"]


def test_a_class_below_its_floor_undoes_the_iteration_and_is_named(tmp_path: Path) -> None:
    model = trained(tiny_residual, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # one class always wins: the others have nothing right, while the average may fall as it likes
    ruin = {**SHORT, "learning_rate": 5.0, "momentum": 0.0, "weight_decay": 0.0, "gradient_clip": 1.0}
    floors = config(max_drop=1.0, max_worst_class_drop=0.3, retrain=ruin)
    result = fit(model, tiny_task(), floors, FolderContext(tmp_path / "fit"))
    row = result.metrics["iterations"][-1]
    assert not row["kept"] and row["worst_class_accuracy"] < 0.5
    assert "class 'corner" in result.metrics["stopped"] and "below the floor" in result.metrics["stopped"]
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    assert result.metrics["worst_class_accuracy"] == result.metrics["baseline_worst_class_accuracy"]


def test_steps_of_equal_ratio_reach_the_target(tmp_path: Path) -> None:
    model = trained(tiny_residual, tmp_path)
    still = {**SHORT, "epochs": 0}
    wanted = config(target_mac_reduction=0.6, target_steps=3, max_frac_per_iter=0.01, retrain=still)
    result = fit(model, tiny_task(), wanted, FolderContext(tmp_path / "fit"))
    shares = [row["macs"] / result.metrics["macs_before"] for row in result.metrics["iterations"]]
    assert result.metrics["stopped"] == "target reached" and len(shares) == 3
    for step, share in enumerate(shares, start=1):
        assert 0.4 ** (step / 3) - 0.06 < share <= 0.4 ** (step / 3)
    coarse = config(target_mac_reduction=0.6, target_steps=12, round_to=4, retrain=still)
    result = fit(trained(tiny_residual, tmp_path), tiny_task(), coarse, FolderContext(tmp_path / "coarse"))
    assert result.metrics["stopped"] == "target reached", "steps that the widths have passed already are left out"
    assert len(result.metrics["iterations"]) < 12


class Interrupted(Exception):
    """Stands for a kill."""


class Stopping(FolderContext):
    """Counts saves and dies at one of them, after or before it is on disk."""

    saves, stop, before = 0, -1, False

    def save(self, name: str, state: State) -> None:
        self.saves += 1
        if self.saves == self.stop and self.before:
            raise Interrupted
        super().save(name, state)
        if self.saves == self.stop:
            raise Interrupted


@pytest.mark.slow
def test_interrupted_anywhere_ends_with_the_same_bits(tmp_path: Path) -> None:
    model = trained(tiny_residual, tmp_path)
    wanted = config(target_mac_reduction=0.3, max_frac_per_iter=0.2, prepare=SHORT, finetune=SHORT)
    whole = Stopping(tmp_path / "whole", seed=3)
    expected = fit(copy.deepcopy(model), tiny_task(), wanted, whole)
    assert len(expected.metrics["iterations"]) == 2 and whole.saves == 6
    for stop in range(1, whole.saves + 1):
        context = Stopping(tmp_path / f"stop{stop}", seed=3)
        context.stop, context.before = stop, stop % 2 == 0
        with pytest.raises(Interrupted):
            fit(copy.deepcopy(model), tiny_task(), wanted, context)
        torch.manual_seed(stop)
        again = fit(copy.deepcopy(model), tiny_task(), wanted, FolderContext(tmp_path / f"stop{stop}", seed=3))
        assert again.edit.data == expected.edit.data and again.metrics == expected.metrics, stop
        here, there = again.model.state_dict(), expected.model.state_dict()
        assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here), stop
        assert all(torch.equal(again.artifacts[k], v) for k, v in expected.artifacts.items()), stop


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"), [("patchwork", 0.5), ("residual", 0.7), ("gated", 0.1), ("transformer", 0.3)]
)
def test_models_of_all_kinds_are_pruned_with_residual_streams(name: str, share: float, tmp_path: Path) -> None:
    wanted = config(prune_residual=True, target_mac_reduction=share, round_to=2, min_width=0.2)
    result = fit(pruning_models.MODELS[name](), tiny_task(), wanted, FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] >= share


def test_a_target_that_the_streams_alone_would_reach_names_prune_residual(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyResidual(width=24, inner=6).eval()  # the inner layers have next to nothing to give
    note = (
        r"; set `prune_residual: true`, which alone reaches it: with the streams of residual blocks 0\.[6-9]\d+ can go"
    )
    fast: dict[str, Any] = {"criterion": "l1", "max_frac_per_iter": 0.9, "max_drop": 1.0, "retrain": {"epochs": 0}}
    auto = ClassAwarePruningConfig(**fast, target_mac_reduction="auto")
    result = fit(copy.deepcopy(model), tiny_task(), auto, FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] < 0.4
    assert [re.search(note, text) is not None for text in result.notes if "MACs went" in text] == [True]
    with pytest.raises(StageError, match=r"cannot be reached: .* lower these or the target, or set `prune_residual"):
        fit(copy.deepcopy(model), tiny_task(), config(target_mac_reduction=0.5), FolderContext(tmp_path / "b"))
    with pytest.raises(StageError, match="which does not reach it either"):
        fit(copy.deepcopy(model), tiny_task(), config(target_mac_reduction=0.99), FolderContext(tmp_path / "c"))
    wanted = ClassAwarePruningConfig(**fast, target_mac_reduction="auto", prune_residual=True)
    result = fit(copy.deepcopy(model), tiny_task(), wanted, FolderContext(tmp_path / "d"))
    assert result.metrics["mac_reduction"] > 0.49 and not any("prune_residual" in text for text in result.notes)


def test_two_inputs(tmp_path: Path) -> None:
    class Joined(ImageClassification):
        def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
            return batch

    plain = tiny_task()
    splits = {}
    for name, split in plain.splits.items():
        x = split.batch(list(range(len(split)))).inputs[0]
        vector = torch.randn(len(split), 5, generator=torch.Generator().manual_seed(1))
        splits[name] = TensorSplit([x, vector], split.targets)
    task: Task = Joined(splits, plain.labels)
    torch.manual_seed(0)
    result = fit(pruning_models.TwoInputs().eval(), task, config(target_mac_reduction=0.3), FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] >= 0.3
    assert set(result.edit.data["keep"]) >= {"conv", "hidden", "fc"}


def test_nothing_to_prune_says_why_for_each_layer(tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"no layer of this model can be pruned[\s\S]*1: it produces the model's output"
    ):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), tiny_task(), config(), FolderContext(tmp_path))
    with pytest.raises(StageError, match="excluded by the recipe"):
        fit(tiny_residual(), tiny_task(), config(exclude=("blocks.*",)), FolderContext(tmp_path))


def test_without_a_wish_a_model_that_cannot_be_pruned_is_left_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = fit(model, tiny_task(), ClassAwarePruningConfig(), FolderContext(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())
    assert not result.edit.data["keep"]
    assert any("nothing was removed" in note and "it produces the model's output" in note for note in result.notes)


def test_without_a_wish_half_of_the_macs_go_or_what_the_widths_allow(tmp_path: Path) -> None:
    fast = {"max_frac_per_iter": 0.5, "max_drop": 1.0, "retrain": {"epochs": 0}}
    half = fit(tiny_residual(), tiny_task(), ClassAwarePruningConfig(**fast), FolderContext(tmp_path / "half"))
    assert half.metrics["mac_reduction"] == pytest.approx(0.5, abs=0.06) and half.metrics["mac_reduction"] >= 0.5
    wide = ClassAwarePruningConfig(**fast, min_width=0.8)
    less = fit(tiny_residual(), tiny_task(), wide, FolderContext(tmp_path / "less"))
    assert 0.0 < less.metrics["mac_reduction"] < 0.3 and less.metrics["stopped"] == "target reached"
    assert any("min_width 0.8 allows no more" in note for note in less.notes)
    # 16 filters became another number, and the CPU computes 8 at a time
    assert any("no multiple of 8" in note and "`round_to: cpu`" in note for note in less.notes)
    rounded = ClassAwarePruningConfig(**fast, round_to="cpu")
    even = fit(tiny_residual(), tiny_task(), rounded, FolderContext(tmp_path / "even"))
    assert even.edit.data["keep"] and not any("no multiple" in note for note in even.notes)


def test_target_out_of_reach_is_said_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot be reached: .*at most 0\.[0-9]+ of the MACs"):
        fit(tiny_residual(), tiny_task(), config(target_mac_reduction=0.99), FolderContext(tmp_path))
    assert not list(tmp_path.iterdir())


def test_missing_class_is_refused(tmp_path: Path) -> None:
    task = tiny_task()
    short = TensorSplit([torch.randn(6, 1, 12, 12)], torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.raises(DataError, match="corner3"):
        fit(
            tiny_residual(),
            ImageClassification({**task.splits, "calibration": short}, task.labels),
            config(),
            FolderContext(tmp_path),
        )


@pytest.mark.slow
def test_saturated_counts_are_pointed_out(tmp_path: Path) -> None:
    absolute = config(target_mac_reduction=None, tau_mode="absolute")
    result = fit(tiny_transformer(), tiny_task(), absolute, FolderContext(tmp_path))
    assert any("class counts say nothing" in note for note in result.notes)
    assert result.metrics["stopped"] == "no candidates" and not result.edit.data["keep"]
    chosen = fit(tiny_transformer(), tiny_task(), config(max_iterations=1), FolderContext(tmp_path / "auto"))
    assert any("never exactly 0" in note and "0.3 times" in note for note in chosen.notes)
    assert not any("say nothing" in note for note in chosen.notes)


def test_recipes_can_name_every_criterion() -> None:
    schema = ClassAwarePruningConfig.model_json_schema()["properties"]["criterion"]
    assert set(schema["enum"]) == {"auto", *CRITERIA}
    for name in schema["enum"]:
        assert config(criterion=name).criterion == name
    with pytest.raises(ValidationError, match="did you mean 'fisher'"):
        config(criterion="fischer")
    assert config().criterion_name("ab") == "class_coverage_fpgm"
    assert config(target_mac_reduction=None).criterion_name("ab") == "class_count"
    assert config(criterion="l1").criterion_name("ab") == "l1"
    assert config().criterion_name(()) == "taylor" and "test" not in STAGE.splits
