"""Both metrics that ship pass the same tests; a task may bring its own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgewright.models.layers.multi_exit import ExitOutput
from edgewright.pipeline import FolderContext
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import Accuracy, Answer, Metric, Score, metric_named, within
from edgewright.pipeline.report.steps import measure
from edgewright.pipeline.stages.class_aware_pruning import STAGE as PRUNING
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.evaluation import answers, evaluate

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
TRUTH = torch.tensor([0, 0, 0, 1, 1, 1, 0])


def logits(labels: Tensor, classes: int = 3) -> Tensor:
    return nn.functional.one_hot(labels, classes).float()


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy"])
class TestEvery:
    def test_batches_do_not_matter(self, name: str) -> None:
        metric = metric_named(name, 3)
        whole = metric.score([Answer(logits(LABELS), TRUTH)])
        parts = metric.score(Answer(logits(LABELS[i : i + 2]), TRUTH[i : i + 2]) for i in range(0, 7, 2))
        assert whole == parts and whole.rows == 7

    def test_a_decision_counts_as_its_class(self, name: str) -> None:
        metric = metric_named(name, 3)
        decided = ExitOutput(LABELS, torch.zeros(7, 3), torch.zeros(7, dtype=torch.int64))
        assert metric.score([Answer(decided, TRUTH)]) == metric.score([Answer(logits(LABELS), TRUTH)])

    def test_perfect_is_one_and_nothing_is_zero(self, name: str) -> None:
        metric = metric_named(name, 3)
        assert metric.score([Answer(logits(TRUTH), TRUTH)]).value == 1.0
        assert metric.score([]).value == 0.0

    def test_worse_is_a_positive_drop(self, name: str) -> None:
        metric = metric_named(name, 3)
        assert metric.drop(0.9, 0.8) == pytest.approx(0.1) and metric.drop(0.8, 0.9) < 0
        assert within(metric, 0.95, 0.94, 0.01) and not within(metric, 0.95, 0.9399, 0.01)


def test_the_figures() -> None:
    found = Accuracy(3).score([Answer(logits(LABELS), TRUTH)])
    assert found == Score(5 / 7, 7, 5 / 7, 2 / 3, (3 / 4, 2 / 3, None))
    balanced = metric_named("balanced_accuracy", 3).score([Answer(logits(LABELS), TRUTH)])
    assert balanced.value == pytest.approx((3 / 4 + 2 / 3) / 2) and balanced.accuracy == 5 / 7


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(DataError, match="unknown metric 'acuracy'; there are accuracy, balanced_accuracy"):
        ImageClassification({"test": (torch.zeros(1, 2), [0])}, ["a"], metric="acuracy")


class CrossEntropy:
    """A metric without classes, better when lower: what a language model's task has."""

    name = "cross_entropy"

    def score(self, answers: Iterable[Answer]) -> Score:
        total, rows = 0.0, 0
        for output, targets in answers:
            assert isinstance(output, Tensor)
            total += float(nn.functional.cross_entropy(output, targets, reduction="sum"))
            rows += len(targets)
        return Score(total / rows, rows)

    def drop(self, before: float, after: float) -> float:
        return after - before


def own(metric: Metric) -> ImageClassification:
    task = tiny.tiny_task()
    return ImageClassification(task.splits, task.labels, metric=metric)


def test_a_metric_of_ones_own_fills_the_step_row() -> None:
    fields = measure(tiny.tiny_residual(), own(CrossEntropy()), torch.device("cpu")).fields
    assert fields["metric"] == "cross_entropy" and fields["quality"] > 0
    assert fields["accuracy"] is None and fields["worst_class_accuracy"] is None and fields["per_class"] == ()


def test_a_floor_is_held_in_the_tasks_metric(tmp_path) -> None:  # type: ignore[no-untyped-def]
    task = own(CrossEntropy())
    config = PRUNING.config(
        prepare=None, retrain={"epochs": 0}, finetune=None, criterion="random", target_mac_reduction=0.7, max_drop=0.0
    )
    model = tiny.tiny_residual()
    before = evaluate(model, task, "validation").value
    result = PRUNING.fit(model, task, config, FolderContext(tmp_path))
    after = evaluate(result.model, task, "validation").value
    assert after <= before, "a lower cross entropy is better: pruning that raises it is undone"


def test_answers_leave_no_graph() -> None:
    found = next(answers(tiny.tiny_residual(), tiny.tiny_task().splits["test"], size=3))
    assert isinstance(found.output, Tensor) and not found.output.requires_grad and len(found.targets) == 3


def test_targets_that_are_ignored_count_for_no_class() -> None:
    score = Accuracy(3).score([Answer(logits(LABELS), torch.where(TRUTH == 0, -100, TRUTH))])
    assert (score.rows, score.accuracy, score.per_class) == (
        3,
        pytest.approx(2 / 3),
        (None, pytest.approx(2 / 3), None),
    )
