from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_on_disk import write_recipe
from tiny import tiny_task
from torch import Tensor, nn

from edgewright import edge_runtime
from edgewright.pipeline.analysis.channels.specialising import class_cut
from edgewright.pipeline.analysis.channels.surgery import pruned
from edgewright.pipeline.errors import DataError, StageError
from edgewright.pipeline.metric import IGNORED, Answer
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.tasks.class_subset import ClassSubset, class_indices, restricted
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.segmentation import Segmentation


def test_a_subset_has_the_samples_of_its_classes_numbered_anew() -> None:
    whole = tiny_task()
    task = ClassSubset(whole, (1, 3))
    assert task.labels == ("corner1", "corner3")
    split, before = task.splits["test"], whole.splits["test"]
    rows = [i for i, y in enumerate(before.targets.tolist()) if y in (1, 3)]
    assert len(split) == len(rows) < len(before)
    batch = split.batch([0, 2, 5])
    assert torch.equal(batch.inputs[0], before.batch([rows[0], rows[2], rows[5]]).inputs[0])
    assert batch.targets.tolist() == [(before.targets[rows[i]].item() - 1) // 2 for i in (0, 2, 5)]
    assert list(split.sample_digests) == [before.sample_digests[i] for i in rows]
    assert split.targets.tolist() == [(y - 1) // 2 for y in before.targets[rows].tolist()]
    logits = torch.eye(2)[split.targets]
    assert task.metric.score([(logits, split.targets)]).per_class == (1.0, 1.0)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [(["corner9", 1], "no class 'corner9'"), ([4, 1], "no class 4"), (["corner1", 1], "twice"), ([2], "two classes")],
)
def test_classes_that_cannot_be_are_named(wanted: list[str | int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        class_indices(tiny_task().labels, wanted, "stage 'x'")
    assert class_indices(tiny_task().labels, ["corner3", 0], "stage 'x'") == (0, 3)


def test_all_classes_or_none_named_is_the_task_itself() -> None:
    task = tiny_task()
    assert restricted(task, (), "x") is task
    assert restricted(task, (3, 2, 1, 0), "x") is task


def test_a_split_without_the_classes_is_refused() -> None:
    rows = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    more = (torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))
    task = ImageClassification({"train": more, "test": rows}, list("abcd"))
    with pytest.raises(DataError, match=r"split 'test' .* no sample of the classes c, d"):
        ClassSubset(task, (2, 3))


def test_logits_of_the_chosen_classes_stay_as_they_are() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        """Logits from two layers, one of which starts at zero."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.a(x) + self.b(x.square()).flip(1)
            return logits

    model, x = Two().eval(), torch.randn(3, 6)
    keep = class_cut(model, (x[:1],), (1, 2))
    assert keep["a"]["out"].tolist() == [1, 2] and keep["b"]["out"].tolist() == [2, 3]
    with torch.no_grad():
        nn.init.normal_(model.b.weight)
        assert torch.allclose(pruned(model, keep)(x), model(x)[:, [1, 2]], atol=1e-6)


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.LayerNorm(5)])
def test_logits_that_are_mixed_are_refused(last: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 5), last).eval()
    with pytest.raises(StageError, match="cannot be specialised"):
        class_cut(model, (torch.randn(1, 6),), (1, 2))


@pytest.mark.slow
def test_a_specialised_run_exports_the_chosen_labels(tmp_path: Path) -> None:
    prune = {
        "name": "class_aware_pruning",
        "classes": ["label2", 0],
        "target_mac_reduction": 0.3,
        "max_drop": 0.2,
        "retrain": {"epochs": 1},
    }
    stages = [
        {"name": "train", "epochs": 3, "batch_size": 16},
        prune,
        {"name": "train", "id": "tune", "epochs": 1, "batch_size": 16},
    ]
    model = {"name": "python:net.py:net", "args": {"width": 12}}
    task = {"name": "python:data.py:task", "args": {"splits": ["train", "calibration", "validation", "test"]}}
    control = {"argument": "width", "between": [2, 12], "training": {"epochs": 3, "batch_size": 16}}
    recipe = write_recipe(tmp_path, model=model, task=task, stages=stages, control=control)
    result = run(recipe, tmp_path / "out")
    assert [len(step.per_class) for step in result.steps] == [3, 3, 2, 2, 2], "the control knows the same classes"
    assert [step.accuracy is not None and step.accuracy > 0.9 for step in result.steps[2:]] == [True] * 3
    assert result.controls == (result.steps[-1].step,) == ("control",)
    manifest = json.loads((result.bundle / "manifest.json").read_text())
    assert [answer["labels"] for answer in manifest["answers"]] == [["label0", "label2"]]
    edge_runtime.verify(result.bundle).raise_if_failed()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"]["labels"] == ["label0", "label2"] and report["summary"]["accuracy_change"] is None
    assert any("label0, label2" in note for note in report["notes"])
    again = run(recipe, tmp_path / "out")
    assert again.steps == result.steps
    wrong = [{**prune, "classes": ["label7", 0]}]
    with pytest.raises(DataError, match="no class 'label7'"):
        run(write_recipe(tmp_path, model=model, task=task, stages=wrong), tmp_path / "out")


def _maps(first: str) -> Segmentation:
    maps = torch.tensor([[[0, 1], [2, IGNORED]], [[1, 1], [1, 1]]])
    return Segmentation({"test": (torch.zeros(2, 1, 2, 2), maps)}, [first, "cat", "dog"])


def test_pixels_of_other_classes_are_background_where_there_is_one() -> None:
    task = restricted(_maps("background"), ["background", "dog"], "x")
    assert isinstance(task, Segmentation) and task.class_names == ("background", "dog")
    assert task.splits["test"].batch([0, 1]).targets.tolist() == [[[0, 0], [1, IGNORED]], [[0, 0], [0, 0]]]
    assert [spec.labels for spec in task.answers] == [("background", "dog")]
    assert task.provenance["classes"] == ["background", "dog"]
    assert restricted(_maps("background"), [0, 1, 2], "x").labels == ()


def test_pixels_of_other_classes_are_ignored_where_there_is_none() -> None:
    task = restricted(_maps("sky"), [0, "dog"], "x")
    split = task.splits["test"]
    assert len(split) == 1 and len(split.sample_digests) == 1, "a map with nothing left leaves"
    assert split.targets.tolist() == [[[0, IGNORED], [1, IGNORED]]]
    logits = torch.randn(1, 2, 2, 2)
    assert torch.isfinite(task.loss(logits, split.targets))
    assert task.metric.score([Answer(logits, split.targets)]).rows == 1
    with pytest.raises(DataError, match="'dog' alone would be left"):
        restricted(_maps("sky"), ["dog"], "x")


def test_a_task_that_says_nothing_about_other_classes_is_not_restricted() -> None:
    class Shows:
        name, labels, class_names = "mine", (), ("a", "b")

        def classes_present(self, targets: Tensor) -> Tensor:
            return targets

        def class_loss(self, output: Tensor, targets: Tensor, index: int) -> Tensor:
            return output

    task: Any = Shows()
    with pytest.raises(DataError, match="method `of_classes`"):
        restricted(task, ["a"], "stage 'x'")
    assert restricted(task, ["b", 0], "x") is task
