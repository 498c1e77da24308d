"""Pruning tasks without classes: criteria of weights and of the task's own loss work, those of classes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from unlabelled import Embedding, Regression, network

from edgewright.pipeline.errors import DataError, RecipeError
from edgewright.pipeline.stage_registry import stage_named
from edgewright.pipeline.stages.class_aware_pruning import CRITERIA, STAGE, ClassAwarePruningConfig, fit
from edgewright.pipeline.stages.class_aware_pruning.scored_samples import ScoredSamples, loss_gradients
from edgewright.pipeline.stages.class_aware_pruning.scores import ScoringSettings, collect
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import check_classes
from edgewright.pipeline.tasks.causal_lm import CausalLM

NO_TRAINING = {"retrain": {"epochs": 0}, "max_drop": 1.0}


class Words(nn.Module):
    """A language model whose inner width may go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        logits: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return logits


def words() -> tuple[nn.Module, CausalLM]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    names = ("train", "calibration", "validation", "test")
    return Words().eval(), CausalLM({name: torch.randint(0, 7, (12, 6), generator=generator) for name in names}, 7)


def config(**changes: Any) -> ClassAwarePruningConfig:
    return ClassAwarePruningConfig.model_validate({**NO_TRAINING, **changes})


@pytest.mark.parametrize("criterion", ["auto", *(name for name, c in CRITERIA.items() if not c.needs_classes)])
@pytest.mark.parametrize("kind", ["regression", "words"])
def test_criteria_without_classes_prune(tmp_path: Path, kind: str, criterion: str) -> None:
    model, task = (network(width=32), Regression()) if kind == "regression" else words()
    result = fit(model, task, config(criterion=criterion, target_mac_reduction=0.3), FolderContext(tmp_path))
    assert result.metrics["stopped"] == "target reached" and result.metrics["mac_reduction"] >= 0.3
    said = [note for note in result.notes if "no classes to be aware of: filters were scored by taylor" in note]
    assert bool(said) == (criterion == "auto")
    assert not any("class" in name for name in result.artifacts)


def test_a_threshold_and_the_loss_per_mac_need_no_classes_either(tmp_path: Path) -> None:
    for number, changes in enumerate(({"target_mac_reduction": None}, {"allocation": "loss_per_mac"})):
        result = fit(
            network(3), Embedding(3), config(**changes, max_iterations=1), FolderContext(tmp_path / str(number))
        )
        assert result.metrics["criterion"] == "taylor"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"criterion": name}, f"criterion is {name}.* l1, l2, fpgm")
            for name, c in CRITERIA.items()
            if c.needs_classes
        ),
        ({"classes": [0, 1]}, "classes speaks of classes"),
        ({"only_correct": True}, "only_correct speaks of classes"),
        ({"max_worst_class_drop": 0.0}, "max_worst_class_drop speaks of classes"),
    ],
)
def test_what_needs_classes_is_refused(changes: dict[str, Any], message: str) -> None:
    assert STAGE.check is not None
    with pytest.raises(RecipeError, match=message):
        STAGE.check(network(), Regression(), config(**changes))


def test_no_labels_are_drawn_from_numbers() -> None:
    sharing = stage_named("basis_sharing")
    assert sharing.check is not None
    drawn = sharing.config(whitening="two_sided", gradient_labels="sampled")
    with pytest.raises(RecipeError, match="gradient_labels is sampled"):
        sharing.check(network(), Regression(), drawn)
    sharing.check(*words(), drawn)


def test_who_needs_classes_is_told_that_there_are_none() -> None:
    with pytest.raises(DataError, match=r"has no classes .*, and stage 'early_exit' decides between classes"):
        check_classes(Regression(), "train", "stage 'early_exit'")
    assert not STAGE.needs_classes(config(), Regression())


def test_taylor_is_the_gradient_of_the_tasks_own_loss_sample_by_sample(tmp_path: Path) -> None:
    model, task = network(width=6), Regression(rows=9)
    split = task.splits["calibration"]
    want = torch.zeros(6)
    for row in range(9):
        batch = split.batch([row])
        hidden = model[0](batch.inputs[0])
        (gradient,) = torch.autograd.grad(task.loss(model[1:](hidden), batch.targets), hidden)
        want += (hidden * gradient).abs()[0] / 9
    for size in (1, 4, 64):
        settings = ScoringSettings(images_per_class=1, batch_size=size)
        found = collect(model, ["0"], ScoredSamples(task, split), settings, FolderContext(tmp_path))["0"]
        torch.testing.assert_close(found.taylor, want[None], rtol=1e-4, atol=1e-7)


def test_a_sample_without_a_gradient_has_no_effect() -> None:
    effect = loss_gradients(lambda x, y: (x - y).square().mean(), torch.ones(2, 3), torch.ones(2, 3))
    assert float(effect.directions[0].abs().sum()) == float(effect.size.sum()) == 0.0
