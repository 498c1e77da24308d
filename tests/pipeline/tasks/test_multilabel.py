"""Several labels: the task, its metric, and the shipped readers of a CSV file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import Answer
from edgewright.pipeline.task import ShowsClasses, presence
from edgewright.pipeline.tasks.multilabel import MultiLabel
from edgewright.pipeline.tasks.shipped.multilabel import multilabel
from edgewright.pipeline.tasks.shipped.synthetic_multilabel import synthetic_multilabel

IMAGES = pytest.importorskip("PIL.Image")


def _task(**options: object) -> MultiLabel:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.rand(60, 3, generator=generator) < 0.4
    return MultiLabel.from_arrays(x, y, ["a", "b", "c"], input_name="x", **options)


def test_the_losses_of_the_classes_add_up() -> None:
    task = _task()
    targets = task.splits["train"].targets
    logits = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sum(task.class_loss(logits, targets, c) for c in range(3)), task.loss(logits, targets))
    assert isinstance(task, ShowsClasses) and task.labels == ()
    assert torch.equal(presence(task, targets), targets.bool())


def test_average_precision_is_the_mean_over_classes_that_occur() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 2.0], [1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    score = _task().metric.score([Answer(logits[:2], targets[:2]), Answer(logits[2:], targets[2:])])
    # a: hits at ranks 1 and 3; b never occurs; c: its hit is last
    assert score.rows == 4 and score.value == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    counted = _task(metric="f1", thresholds=0.6).metric.score([Answer(logits, targets)])
    # at 0.6 (a logit of 0.405): a says rows 0, 1, 2 (f1 0.8), c all four (f1 0.4)
    assert counted.value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accuracy"}, "there are mean_average_precision and f1"),
        ({"thresholds": (0.5, 0.5)}, "or one for each of the 3 classes"),
        ({"thresholds": 1.5}, "between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _task(**change)


def test_targets_are_zeros_and_ones() -> None:
    with pytest.raises(DataError, match="has the target 2"):
        MultiLabel({"train": (torch.zeros(40, 2), torch.full((40, 2), 2.0))}, ["a", "b"])
    with pytest.raises(DataError, match=r"float32 \[rows, classes\]"):
        MultiLabel({"train": (torch.zeros(40, 2), torch.zeros(40, 3))}, ["a", "b"])


def _folder(place: Path, text: str, images: int = 12) -> tuple[Path, Path]:
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(images):
        picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        IMAGES.fromarray(picture).save(place / "photos" / f"{number}.png")
    (place / "table.csv").write_text(text)
    return place / "photos", place / "table.csv"


def test_labels_come_from_columns_or_from_names(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,{i % 2},{int(i < 6)},{['train', 'test'][i % 2]}\n" for i in range(12))
    photos, table = _folder(tmp_path, "file,cat,dog,split\n" + rows)
    task = multilabel(photos, table, 8, split_column="split")
    assert task.class_names == ("cat", "dog") and set(task.splits) == {"train", "test"}
    assert task.splits["train"].targets.tolist() == [[0.0, 1.0]] * 3 + [[0.0, 0.0]] * 3
    assert task.splits["test"].batch([0]).inputs[0].shape == (1, 3, 8, 8)
    table.write_text("file,shown\n" + "".join(f"{i}.png,{'dog; cat' if i % 2 else ''}\n" for i in range(12)))
    named = multilabel(photos, table, 8, labels_column="shown", separator=";")
    assert named.class_names == ("cat", "dog")
    assert sum(len(split) for split in named.splits.values()) == 12
    assert sum(float(split.targets.sum()) for split in named.splits.values()) == 12.0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,cat\n99.png,1\n", {}, r"line 2: there is no image .*99.png"),
        ("file,cat\n0.png,1\n0.png,0\n", {}, "line 3: '0.png' was in line 2 already"),
        ("file,cat\n0.png,maybe\n", {}, "line 2: 'cat' is 'maybe': a label is 1 or 0"),
        ("file,cat\n0.png\n", {}, "another number of cells"),
        ("file,cat\n../table.csv,1\n", {}, "no path below"),
        ("file,cat\n", {}, "has no row"),
        ("name,cat\n0.png,1\n", {}, "no column 'file'"),
        (
            "file,shown\n0.png,cot\n",
            {"labels_column": "shown", "labels": ["cat"]},
            "unknown label 'cot' \\(did you mean 'cat'",
        ),
        ("file,cat,part\n0.png,1,tests\n", {"split_column": "part"}, "unknown split 'tests'"),
    ],
)
def test_a_row_that_cannot_be_right_is_named_by_its_line(
    tmp_path: Path, text: str, options: dict[str, object], message: str
) -> None:
    photos, table = _folder(tmp_path, text, images=2)
    with pytest.raises(DataError, match=message):
        multilabel(photos, table, 8, **options)


def test_pages_say_what_they_show() -> None:
    task = synthetic_multilabel(rows={"train": 20, "test": 8}, size=24, characters="AX", most=2)
    assert task.splits["train"].batch([0, 1]).inputs[0].shape == (2, 1, 24, 24)
    again = synthetic_multilabel(rows={"train": 20, "test": 8}, size=24, characters="AX", most=2)
    assert list(task.splits["test"].sample_digests) == list(again.splits["test"].sample_digests)
    assert 0.2 < float(task.splits["train"].targets.mean()) < 0.95
