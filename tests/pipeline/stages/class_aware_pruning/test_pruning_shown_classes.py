"""Pruning where a sample shows several classes, and where a model answers in several named outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_boxes, tiny_detector, tiny_labels, tiny_map, tiny_pages, tiny_residual, tiny_task
from torch import Tensor, nn
from unlabelled import TwoAnswers, TwoHeads

from edgewright.edge_runtime.answers.class_map import ClassMapKind
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, DecoderSpec
from edgewright.pipeline.analysis.channels.specialising import class_columns, class_cut
from edgewright.pipeline.analysis.channels.surgery import pruned
from edgewright.pipeline.errors import DataError, RecipeError, StageError
from edgewright.pipeline.stages.class_aware_pruning import STAGE, ClassAwarePruningConfig, fit
from edgewright.pipeline.stages.class_aware_pruning.scored_samples import ScoredSamples
from edgewright.pipeline.stages.class_aware_pruning.scores import ScoringSettings, collect
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.regression import Regression
from edgewright.pipeline.tasks.segmentation import Segmentation

NO_TRAINING = {"retrain": {"epochs": 0}, "max_drop": 1.0}


def config(**changes: Any) -> ClassAwarePruningConfig:
    return ClassAwarePruningConfig.model_validate({**NO_TRAINING, **changes})


def rare() -> Segmentation:
    """Three classes, of which calibration shows two."""
    images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    maps = (images[:, 0] > 0).long()
    whole = maps.clone()
    whole[:, 0, 0] = 2
    return Segmentation(
        {"train": (images, whole), "calibration": (images + 1, maps), "validation": (images + 2, whole)},
        ["background", "cat", "dog"],
    )


def test_a_sample_counts_for_every_class_that_it_shows_with_that_classs_part_of_the_loss(tmp_path: Path) -> None:
    model, task = tiny_map(), tiny_pages()
    split = task.splits["calibration"]
    present = task.classes_present(split.targets)
    samples = ScoredSamples(task, split)
    assert samples.names == ("background", "A", "X") and list(samples.classes) == [0, 1, 2]
    context = FolderContext(tmp_path)
    settings = ScoringSettings(images_per_class=len(split), batch_size=3, tau_mode="absolute")
    found = collect(model, ["0"], samples, settings, context)["0"]
    for index in range(3):
        rows = present[:, index].nonzero().flatten()
        assert torch.equal(samples.chosen(index, len(split), context), rows)
        taylor, hits = torch.zeros(12), torch.zeros(12, 16, 16)
        for row in rows.tolist():
            batch = split.batch([row])
            maps = model[0](*batch.inputs)
            loss = task.class_loss(model[1:](maps), batch.targets, index)
            (gradient,) = torch.autograd.grad(loss, maps)
            taylor += (maps * gradient).sum(dim=(0, 2, 3)).abs() / len(rows)
            hits += (maps * gradient != 0)[0] / len(rows)
        torch.testing.assert_close(found.taylor[index], taylor, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.per_class[index], hits.amax(dim=(1, 2)))


@pytest.mark.parametrize("criterion", ["auto", "class_count", "fisher", "similarity"])
def test_criteria_prune_maps(tmp_path: Path, criterion: str) -> None:
    task = tiny_pages()
    result = fit(tiny_map(), task, config(criterion=criterion, target_mac_reduction=0.3), FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] >= 0.3
    assert result.metrics["criterion"] == ("class_coverage_fpgm" if criterion == "auto" else criterion)
    assert not any("no classes" in note for note in result.notes)


def test_a_class_that_no_sample_shows_is_refused_or_left_out(tmp_path: Path) -> None:
    counting, losing = config(criterion="class_count"), config(criterion="taylor", target_mac_reduction=0.3)
    assert STAGE.needs_classes(counting, rare()) and not STAGE.needs_classes(losing, rare())
    with pytest.raises(DataError, match="class 'dog' has no sample in the 'calibration' split"):
        fit(tiny_map(), rare(), counting, FolderContext(tmp_path / "a"))
    result = fit(tiny_map(), rare(), losing, FolderContext(tmp_path / "b"))
    assert any("shows 'dog' (1 of 3 classes)" in note for note in result.notes)
    assert len(result.artifacts["class_counts.0"]) == 3 and not result.artifacts["class_counts.0"][2].any()


@pytest.mark.parametrize("changes", [{"only_correct": True}, {"max_worst_class_drop": 0.0}])
def test_what_judges_rows_of_one_class_is_refused(changes: dict[str, Any]) -> None:
    assert STAGE.check is not None
    with pytest.raises(RecipeError, match="classes that rows are one of"):
        STAGE.check(tiny_map(), tiny_pages(), config(**changes))


def test_a_network_of_maps_is_specialised_to_some_of_its_classes(tmp_path: Path) -> None:
    model, task = tiny_map(), tiny_pages()
    x = task.splits["test"].batch([0]).inputs
    want = model(*x)[:, [0, 2]]
    keep = class_cut(model, x, (0, 2), class_columns(task.answers))
    torch.testing.assert_close(pruned(model, keep)(*x), want)
    result = fit(model, task, config(classes=["X", "background"], criterion="taylor"), FolderContext(tmp_path))
    assert result.metrics["classes"] == ["background", "X"] and result.model(*x).shape == (1, 2, 16, 16)


def test_a_network_of_several_labels_is_specialised_to_some_of_them(tmp_path: Path) -> None:
    model, task = tiny_residual(), tiny_labels()
    x = task.splits["test"].batch([0]).inputs
    want = model(*x)[:, [1, 3]]
    torch.testing.assert_close(pruned(model, class_cut(model, x, (1, 3), class_columns(task.answers)))(*x), want)
    result = fit(model, task, config(classes=["X", "B"], criterion="class_count"), FolderContext(tmp_path))
    assert result.metrics["classes"] == ["B", "X"] and result.model(*x).shape == (1, 2)


def test_a_detector_is_specialised_to_some_of_its_classes(tmp_path: Path) -> None:
    model, task = tiny_detector(), tiny_boxes()
    x = task.splits["test"].batch([0]).inputs
    want = model(*x)[..., [0, 1, 2, 3, 5]]
    torch.testing.assert_close(pruned(model, class_cut(model, x, (1,), class_columns(task.answers)))(*x), want)
    result = fit(model, task, config(classes=["X"], criterion="taylor"), FolderContext(tmp_path))
    assert result.metrics["classes"] == ["X"] and result.model(*x).shape == (1, 16, 5)


class Head(nn.Module):
    """As of a detector: four numbers of a box and three classes at every place, in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box, self.cls = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"head": torch.cat([self.box(x), self.cls(x)], dim=1).flatten(2).transpose(1, 2), "features": x}


def test_columns_behind_other_numbers_are_found_in_a_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Head().eval(), torch.randn(1, 1, 6, 6)
    monkeypatch.setattr(ClassMapKind, "class_axis", -1)
    monkeypatch.setattr(ClassMapKind, "before_classes", 4)
    columns = class_columns([AnswerSpec("head", "class_map", leaf="head"), AnswerSpec("f", "values", leaf="features")])
    small = pruned(model, class_cut(model, (x,), (1,), columns))
    torch.testing.assert_close(small(x)["head"], model(x)["head"][..., [0, 1, 2, 3, 5]])
    with pytest.raises(StageError, match="0 of the model's answers"):
        class_columns([AnswerSpec("f", "values")])


@pytest.mark.parametrize("criterion", ["class_count", "taylor"])
def test_a_detector_is_specialised_and_keeps_its_boxes(tmp_path: Path, criterion: str) -> None:
    model, task = tiny_detector(), tiny_boxes()
    x = task.splits["test"].batch([0]).inputs
    keep = class_cut(model, x, (1,), class_columns(task.answers))
    torch.testing.assert_close(pruned(model, keep)(*x), model(*x)[..., [0, 1, 2, 3, 5]])
    asked = config(classes=["X"], criterion=criterion, target_mac_reduction=0.3)
    result = fit(model, task, asked, FolderContext(tmp_path))
    assert result.metrics["classes"] == ["X"] and result.metrics["mac_reduction"] >= 0.3
    assert result.model(*x).shape[-1] == 5
    background = AnswerSpec("boxes", "boxes", decoder=DecoderSpec("ssd", (16, 16), ()))
    assert class_columns([background]).first == 5


class SeveralLabels(Regression):
    """Any number of three labels for a row, as a stranger writes it."""

    class_names = ("round", "red", "soft")

    def classes_present(self, targets: Tensor) -> Tensor:
        return targets > 0.5

    def class_loss(self, output: Tensor, targets: Tensor, index: int) -> Tensor:
        each = nn.functional.binary_cross_entropy_with_logits(output, targets, reduction="none")
        return each[:, index].mean() / 3

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output, targets)


@pytest.mark.parametrize("criterion", ["class_count", "auto", "class_coverage", "taylor"])
def test_rows_of_several_labels_are_scored_for_each(tmp_path: Path, criterion: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
    task = SeveralLabels.from_arrays(x, (x[:, :3] > 0).float(), metric="mae")
    split = task.splits["calibration"]
    rows = (split.targets[:, 1] > 0.5).nonzero().flatten()
    samples = ScoredSamples(task, split)
    assert torch.equal(samples.chosen(1, 1000, FolderContext(tmp_path)), rows)
    batch = split.batch(rows)
    effect = samples.gradients(nn.functional.linear(batch.inputs[0], torch.ones(3, 6)), batch.targets, 1)
    assert not effect.directions[0][:, [0, 2]].any(), "of the label's own logit alone"
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    result = fit(model, task, config(criterion=criterion, target_mac_reduction=0.3), FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] >= 0.3 and result.metrics["iterations"]


@pytest.mark.parametrize("criterion", ["taylor", "similarity", "fpgm"])
def test_a_model_of_several_answers_is_pruned(tmp_path: Path, criterion: str) -> None:
    torch.manual_seed(0)
    task: Any = TwoAnswers()
    result = fit(
        TwoHeads().eval(), task, config(criterion=criterion, target_mac_reduction=0.3), FolderContext(tmp_path)
    )
    assert result.metrics["mac_reduction"] >= 0.3 and result.model.body.out_features < 24  # type: ignore[union-attr]


def test_the_gradient_of_every_answer_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, task = TwoHeads().eval(), TwoAnswers()
    split: Any = task.splits["calibration"]
    want = torch.zeros(24)
    for row in range(len(split)):
        batch = split.batch([row])
        hidden = model.body(*batch.inputs)
        found = torch.relu(hidden)
        loss = task.loss({"kind": model.a(found), "size": model.b(found)}, batch.targets)
        (gradient,) = torch.autograd.grad(loss, hidden)
        want += (hidden * gradient).abs()[0] / len(split)
    samples = ScoredSamples(task, split)  # type: ignore[arg-type]
    statistics = collect(
        model, ["body"], samples, ScoringSettings(images_per_class=len(split)), FolderContext(tmp_path)
    )
    torch.testing.assert_close(statistics["body"].taylor[0], want, rtol=1e-4, atol=1e-7)


def test_rows_of_one_class_are_chosen_and_scored_as_ever(tmp_path: Path) -> None:
    task = tiny_task()
    samples = ScoredSamples(task, task.splits["calibration"])
    rows = (task.splits["calibration"].targets == 2).nonzero().flatten()
    assert torch.equal(samples.chosen(2, 1000, FolderContext(tmp_path)), rows)
    batch = task.splits["calibration"].batch(rows)
    logits = tiny_residual()(*batch.inputs)
    effect = samples.gradients(logits, batch.targets, 2)
    (want,) = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"), logits)
    torch.testing.assert_close(effect.directions[0] * effect.size[:, None], want)
