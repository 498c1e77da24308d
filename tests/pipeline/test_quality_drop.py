"""The drop of a task's metric, paired over rows, and what the report and floors say of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from recipes_on_disk import write_recipe
from torch import nn

from edgewright.edge_runtime.measure.paired import paired_drop
from edgewright.pipeline.metric import Accuracy, Answer, BalancedAccuracy, Metric, Perplexity, Score
from edgewright.pipeline.quality_drop import drop_text, measured_drop, no_promise, quality_drop
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.tasks.regression import Regression
from edgewright.pipeline.tasks.segmentation import PixelMetric

GENERATOR = torch.Generator().manual_seed(0)
TRUTH = torch.arange(300) % 3


def _logits(share: float, seed: int) -> torch.Tensor:
    """Right in about `share` of the rows."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(300, generator=generator) > share
    return nn.functional.one_hot(torch.where(wrong, (TRUTH + 1) % 3, TRUTH), 3).float()


def test_accuracy_is_compared_row_by_row() -> None:
    metric = Accuracy(3)
    before, after = (metric.score([Answer(_logits(s, 1), TRUTH)]) for s in (0.9, 0.8))
    drop = quality_drop(metric, before.each, after.each)
    assert drop is not None and before.right is not None and after.right is not None
    assert drop == paired_drop(before.right, after.right) and drop.value == pytest.approx(before.value - after.value)
    assert drop.p_value is not None and drop.low > 0 and drop_text(drop).endswith("n = 300: worse")
    assert "points [" in drop_text(drop)
    same = quality_drop(metric, before.each, before.each)
    assert same is not None and drop_text(same) == "0.00 points [-1.26, 1.26], n = 300: not more than the noise"


def _scores(metric: Metric, first: Any, second: Any, targets: torch.Tensor) -> tuple[Score, Score]:
    return metric.score([Answer(first, targets)]), metric.score([Answer(second, targets)])


def _values() -> tuple[Metric, Any, Any, torch.Tensor]:
    y = torch.randn(60, 2, generator=GENERATOR)
    task = Regression.from_arrays(y, y, columns=("a", "b"), metric="mse")
    return task.metric, y + 0.1, y + 0.2, y


def _maps() -> tuple[Metric, Any, Any, torch.Tensor]:
    y = torch.randint(0, 3, (40, 4, 4), generator=GENERATOR)
    right = nn.functional.one_hot(y, 3).movedim(-1, 1).float()
    noise = torch.randn(40, 3, 4, 4, generator=GENERATOR)
    return PixelMetric("mean_iou", 3), right + 0.3 * noise, right + 0.7 * noise, y


def _words() -> tuple[Metric, Any, Any, torch.Tensor]:
    y = torch.randint(0, 5, (30, 6), generator=GENERATOR)
    right = nn.functional.one_hot(y, 5).float()
    return Perplexity(), 2 * right, right, y


def _balanced() -> tuple[Metric, Any, Any, torch.Tensor]:
    return BalancedAccuracy(3), _logits(0.95, 2), _logits(0.7, 3), TRUTH


@pytest.mark.parametrize("make", [_values, _maps, _words, _balanced])
def test_metrics_that_are_no_mean_over_rows_have_an_interval(make: Any) -> None:
    metric, first, second, targets = make()
    before, after = _scores(metric, first, second, targets)
    drop = quality_drop(metric, before.each, after.each)
    assert drop is not None and drop.rows == len(targets) and drop.p_value is None
    assert drop.value == pytest.approx(metric.drop(before.value, after.value), rel=1e-6)
    assert 0 < drop.low < drop.value < drop.high and drop.verdict == "worse"
    halves = [Answer(first[i : i + 7], targets[i : i + 7]) for i in range(0, len(targets), 7)]
    assert metric.score(halves).value == pytest.approx(before.value)
    assert measured_drop(metric, before, after).startswith(" (drop ")


def test_without_rows_there_is_no_interval() -> None:
    class Own(Accuracy):
        def each(self, right: Any, classes: Any) -> Any:
            return np.zeros((len(right), 2))

    metric = Own(3)
    before, after = _scores(metric, _logits(0.9, 1), _logits(0.8, 1), TRUTH)
    assert quality_drop(metric, before.each, after.each) is None, "it cannot tell what the rows add up to"
    assert quality_drop(Accuracy(3), None, before.right) is None
    assert quality_drop(Accuracy(3), before.right, np.ones(7)) is None
    assert measured_drop(metric, Score(0.5, 10), Score(0.4, 10)) == ""


def test_how_many_rows_a_promise_needs() -> None:
    before = np.ones(300, bool)
    after = before.copy()
    after[:2] = False
    drop = paired_drop(before, after)
    assert drop.value < 0.01 < drop.high
    text = no_promise(drop, 0.01)
    assert text is not None and "300 rows cannot promise that, about 181 could" in text
    assert no_promise(drop, 0.5) is None


@pytest.mark.slow
def test_a_run_pairs_every_step_with_the_reference(tmp_path: Any) -> None:
    stages = [
        {"name": "train", "epochs": 1, "batch_size": 16},
        {
            "name": "class_aware_pruning",
            "criterion": "l1",
            "score_split": "train",
            "target_mac_reduction": 0.3,
            "max_drop": 1.0,
            "retrain": {"epochs": 0},
        },
    ]
    recipe = write_recipe(tmp_path, stages=stages, require={"max_accuracy_drop": 0.9, "max_drop": 0.9})
    result = run(recipe, tmp_path / "out")
    assert set(result.drops) == {"class_aware_pruning"} and result.accuracy_drop == result.drops["class_aware_pruning"]
    final, reference = result.steps[-1], result.steps[-2]
    assert result.drops["class_aware_pruning"].value == pytest.approx(reference.quality - final.quality)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["summary"]["quality_drop"] == pytest.approx(result.drops["class_aware_pruning"].value)
    again = run(recipe, tmp_path / "out")
    assert again.drops == result.drops, "rows are read back"
