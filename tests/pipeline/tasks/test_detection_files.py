"""Images with boxes in COCO's format: read when needed, refused by the id of the annotation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.shipped.detection import detection

IMAGES = pytest.importorskip("PIL.Image")


def _made(place: Path, count: int = 12) -> dict[str, Any]:
    (place / "photos").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        IMAGES.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(place / "photos" / f"{number}.png")
    return {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(count)],
        "annotations": [
            {"id": i, "image_id": 100 + i, "category_id": (7, 3)[i % 2], "bbox": [10, 5, 20, 10.5], "iscrowd": 0}
            for i in range(count - 1)
        ],
    }


def _task(place: Path, data: dict[str, Any], **options: Any):
    (place / "boxes.json").write_text(json.dumps(data))
    return detection(place / "photos", place / "boxes.json", 32, strides=(8,), **options)


def test_boxes_are_scaled_with_their_images(tmp_path: Path) -> None:
    task = _task(tmp_path, _made(tmp_path))
    assert task.class_names == ("cat", "dog") and sum(len(split) for split in task.splits.values()) == 12
    batch = task.splits["train"].batch([0])
    assert batch.inputs[0].shape == (1, 3, 32, 32)
    targets = np.concatenate([split.targets.numpy() for split in task.splits.values()])
    real = targets[targets[..., 0] >= 0]
    assert sorted(real[:, 0].tolist()) == [0.0] * 6 + [1.0] * 5 and len(targets) - len(real) == 1
    np.testing.assert_allclose(real[:, 1:], [[8, 8, 24, 24.8]] * 11, rtol=1e-6)


def test_a_folder_names_the_splits(tmp_path: Path) -> None:
    data = _made(tmp_path)
    (tmp_path / "boxes").mkdir()
    for name, ids in (("train", range(100, 108)), ("test", range(108, 112))):
        part = {**data, "images": [i for i in data["images"] if i["id"] in ids]}
        part["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
        (tmp_path / "boxes" / f"{name}.json").write_text(json.dumps(part))
    task = detection(tmp_path / "photos", tmp_path / "boxes", (16, 32), strides=(8,))
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 8, "test": 4}


def test_a_crowd_is_background_where_that_was_said(tmp_path: Path) -> None:
    data = _made(tmp_path)
    data["annotations"][3]["iscrowd"] = 1
    with pytest.raises(DataError, match="annotation 3 is a crowd"):
        _task(tmp_path, data)
    task = _task(tmp_path, data, crowd="leave_out")
    assert sum(int((split.targets[..., 0] >= 0).sum()) for split in task.splits.values()) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][3].update(bbox=[1, 1, 0, 5]), r"annotation 3: its box .* has no area"),
        (lambda d: d["annotations"][3].update(bbox=[30, 1, 20, 5]), "annotation 3: its box .* leaves the image"),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3]), "annotation 3: its bbox is .* four numbers"),
        (lambda d: d["annotations"][3].update(bbox=[1, 2, 3, float("nan")]), "annotation 3: its box .* has no area"),
        (lambda d: d["annotations"][3].update(image_id=5), "annotation 3: there is no image 5"),
        (lambda d: d["annotations"][3].update(category_id=5), "annotation 3: unknown category 5; there are 7, 3"),
        (lambda d: d["annotations"][3].pop("category_id"), "has no 'category_id'"),
        (lambda d: d["images"][3].update(file_name="no.png"), "image 103: there is no image file"),
        (lambda d: d["images"][3].update(file_name="../boxes.json"), "no path below"),
        (lambda d: d["images"][3].update(width=41), "image 103: .* 20 x 40 pixels and the file says 20 x 41"),
        (lambda d: d["images"].append(d["images"][3]), "the image 103 twice"),
        (lambda d: d.pop("categories"), "lacks the list 'categories'"),
        (lambda d: d["categories"].append({"id": 7, "name": "elk"}), "each with an id of its own"),
    ],
)
def test_what_cannot_be_right_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = _made(tmp_path)
    change(data)
    with pytest.raises(DataError, match=message):
        _task(tmp_path, data)
