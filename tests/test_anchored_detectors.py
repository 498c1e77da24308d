"""Detectors with anchors of their own: training, pruning, sharing, a verified bundle, boxes on the device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import Boxes, load, open_bundle, verify
from edgewright.edge_runtime.inference.image_file import load_image
from edgewright.pipeline.errors import DataError, ModelError
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.runs.outlook import outlook
from edgewright.pipeline.runs.preparation import prepare
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.tasks.shipped.pages import draw_book

STRANGER = """
import torch
from torch import nn


def conv(given, gives, stride=1):
    return nn.Sequential(nn.Conv2d(given, gives, 3, stride, 1), nn.BatchNorm2d(gives), nn.ReLU())


class SSD(nn.Module):
    SIDES = (8, 12, 17)

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(conv(1, 16, 2), conv(16, 24, 2), conv(24, 32), conv(32, 32))
        self.offsets = nn.Conv2d(32, 4 * len(self.SIDES), 3, 1, 1)
        self.logits = nn.Conv2d(32, (1 + classes) * len(self.SIDES), 3, 1, 1)
        self.box_decoder = {
            "name": "ssd",
            "size": (32, 32),
            "anchors": [(4 * x + 2, 4 * y + 2, s, s) for y in range(8) for x in range(8) for s in self.SIDES],
            "weights": (10, 10, 5, 5),
        }

    def forward(self, image):
        features = self.body(image)
        parts = [self.offsets(features), self.logits(features)]
        count = 64 * len(self.SIDES)
        return torch.cat([x.permute(0, 2, 3, 1).reshape(len(image), count, -1) for x in parts], dim=2)
"""
ROWS = "{train: 240, calibration: 40, validation: 40, test: 40}"
TASK = f"{{characters: AX, most: 2, size: 32, decoder: model, rows: {ROWS}}}"
PRUNE = "{name: class_aware_pruning, target_steps: 1, max_drop: 1.0, retrain: {epochs: 2, optimizer: adamw}}"


def _recipe(folder: Path, model: str, task: str, stages: str) -> Path:
    (folder / "mine.py").write_text(STRANGER)
    text = f"model: {model}\ntask: {task}\nstages: {stages}\nbenchmark: {{enabled: false}}\nthreads: 1\n"
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def _files(folder: Path, size: int) -> None:
    """Coloured pages as image files, with COCO's JSON."""
    from PIL import Image

    (folder / "photos").mkdir()
    book = draw_book(rows={"train": 24}, size=32, characters="AX", most=2)
    images, boxes = [], []
    for number, page in enumerate(book.pages["train"].images[..., 0]):
        Image.fromarray(page).resize((size, size)).convert("RGB").save(folder / "photos" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        for label, left, top, right, bottom in book.pages["train"].boxes[number].tolist():
            if label >= 0:
                box = [side * size / 32 for side in (left, top, right - left, bottom - top)]
                boxes.append({"id": len(boxes), "image_id": number, "category_id": int(label), "bbox": box})
    categories = [{"id": 0, "name": "A"}, {"id": 1, "name": "X"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_strangers_ssd_goes_from_training_to_boxes(tmp_path: Path) -> None:
    model, task = '{name: "python:mine.py:SSD", args: {classes: 2}}', f"{{name: synthetic_detection, args: {TASK}}}"
    stages = f"[{{name: train, epochs: 20, optimizer: adamw, learning_rate: 0.003}}, {PRUNE}, {{name: basis_sharing}}]"
    result = run(load_recipe(_recipe(tmp_path, model, task, stages)), tmp_path / "out")
    base, trained, pruned, shared = result.steps
    assert base.quality < 0.05 < 0.1 < trained.quality and shared.quality > 0.25, "map_50"
    assert pruned.macs < 0.6 * trained.macs and shared.unique_weight_bytes < pruned.unique_weight_bytes
    assert result.bundle is not None and verify(result.bundle).passed
    with open_bundle(result.bundle) as bundle:
        decoder = bundle.manifest.answers[0].decoder
        assert decoder is not None and decoder.name == "ssd" and len(decoder.anchors) == 192
    book = draw_book(rows={"train": 240, "test": 40}, size=32, characters="AX", most=2)
    with load(result.bundle) as runner:
        found = runner.predict(book.pages["test"].images)
    assert isinstance(found, Boxes) and found.labels == ("A", "X")
    assert sum(map(len, found.label)) > 20 and all((b[:, 2:] > b[:, :2]).all() for b in found.boxes)


@pytest.mark.slow
def test_the_ssdlite_of_torchvision_is_pruned_and_answers_on_files(tmp_path: Path) -> None:
    _files(tmp_path, 64)
    model = "{name: torchvision:ssdlite320_mobilenet_v3_large, args: {classes: 2, size: 64}}"
    task = "{name: detection, args: {images_path: photos, annotations_path: boxes.json, size: 64, decoder: model}}"
    short = "{name: class_aware_pruning, target_steps: 1, max_drop: 1.0, images_per_class: 2, retrain: {epochs: 0}}"
    result = run(load_recipe(_recipe(tmp_path, model, task, f"[{short}]")), tmp_path / "out")
    assert result.steps[1].macs < 0.6 * result.steps[0].macs
    assert result.bundle is not None and verify(result.bundle).passed
    with load(result.bundle) as runner:
        assert runner.manifest is not None
        found = runner.predict(load_image(tmp_path / "photos" / "3.png", runner.manifest.preprocessing))
    assert isinstance(found, Boxes) and found.labels == ("A", "X") and len(found.boxes) == 1
    assert np.isfinite(found.boxes[0]).all()


@pytest.mark.parametrize(
    ("model", "size", "error", "message"),
    [
        ("{name: torchvision:fasterrcnn_resnet50_fpn, args: {classes: 2}}", 32, ModelError, "has two stages"),
        ('{name: "python:mine.py:conv", args: {given: 1, gives: 7}}', 32, ModelError, "has no `box_decoder`"),
        ('{name: "python:mine.py:SSD", args: {classes: 2}}', 48, DataError, "for images of 32 x 32 pixels.* 48 x 48"),
        ('{name: "python:mine.py:SSD", args: {classes: 3}}', 32, ModelError, "has 8 numbers at a place"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_any_training(
    tmp_path: Path, model: str, size: int, error: type[Exception], message: str
) -> None:
    task = f"{{name: synthetic_detection, args: {TASK.replace('size: 32', f'size: {size}')}}}"
    recipe = load_recipe(_recipe(tmp_path, model, task, "[{name: train, epochs: 1}]"))
    with pytest.raises(error, match=message):
        prepare(recipe)


def test_check_shows_the_task_the_anchors_of_the_model(tmp_path: Path) -> None:
    model, task = '{name: "python:mine.py:SSD", args: {classes: 2}}', f"{{name: synthetic_detection, args: {TASK}}}"
    seen = outlook(load_recipe(_recipe(tmp_path, model, task, f"[{PRUNE}]")), None, alone=False, export=False)
    assert not seen.refused and seen.task == "synthetic_detection"
