"""Folders of images and masks: read when needed, refused by name before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import IGNORED
from edgewright.pipeline.tasks.shipped.segmentation import segmentation

IMAGES = pytest.importorskip("PIL.Image")
CLASSES = ["sky", "road"]


def _made(place: Path, count: int = 12, folder: str = "") -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (place / name / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        mask = np.zeros((6, 8), np.uint8)
        mask[3:] = 1
        mask[0, 0] = 255
        IMAGES.fromarray(picture).save(place / "images" / folder / f"{number}.png")
        IMAGES.fromarray(mask).save(place / "masks" / folder / f"{number}.png")
    return place / "images", place / "masks"


def test_masks_are_read_with_their_images_and_resized_to_the_nearest_pixel(tmp_path: Path) -> None:
    images, masks = _made(tmp_path)
    task = segmentation(images, masks, CLASSES, (12, 16))
    batch = task.splits["train"].batch([0, 1])
    assert batch.inputs[0].shape == (2, 3, 12, 16) and batch.targets.shape == (2, 12, 16)
    assert (batch.targets[:, :2, :2] == IGNORED).all() and (batch.targets[:, 6:] == 1).all()
    assert (batch.targets[:, 2:6] == 0).all() and sum(len(s) for s in task.splits.values()) == 12
    assert torch.equal(task.splits["train"].targets[:2], batch.targets)


def test_a_palette_gives_its_numbers_and_folders_are_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        images, masks = _made(tmp_path, 3, name)
    for file in masks.rglob("*.png"):
        mask = IMAGES.open(file).copy()
        mask.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
        assert mask.mode == "P"
        mask.save(file)
    task = segmentation(images, masks, CLASSES, (6, 8))
    assert set(task.splits) == {"train", "test"} and set(task.splits["train"].targets.unique().tolist()) == {-100, 0, 1}


def test_mirrored_images_take_their_masks_along(tmp_path: Path) -> None:
    images, masks = _made(tmp_path)
    task = segmentation(images, masks, CLASSES, (6, 8), flip=True)
    batch = task.splits["train"].batch(range(6))
    turned = task.augment(batch, torch.Generator().manual_seed(0))
    flipped = [not torch.equal(a, b) for a, b in zip(turned.inputs[0], batch.inputs[0], strict=True)]
    assert 0 < sum(flipped) < 6
    for row, yes in enumerate(flipped):
        assert torch.equal(turned.targets[row], batch.targets[row].flip(-1) if yes else batch.targets[row])


def _without_mask(images: Path, masks: Path) -> None:
    (masks / "3.png").unlink()


def _without_image(images: Path, masks: Path) -> None:
    (images / "3.png").unlink()


def _smaller(images: Path, masks: Path) -> None:
    IMAGES.open(masks / "3.png").resize((4, 3)).save(masks / "3.png")


def _unknown(images: Path, masks: Path) -> None:
    IMAGES.fromarray(np.full((6, 8), 7, np.uint8)).save(masks / "3.png")


def _coloured(images: Path, masks: Path) -> None:
    IMAGES.open(images / "3.png").save(masks / "3.png")


def _broken(images: Path, masks: Path) -> None:
    (masks / "3.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_mask, r"images/3.png has no mask"),
        (_without_image, r"masks/3.png has no image"),
        (_smaller, r"masks/3.png is 3 x 4 and its image .* 6 x 8 pixels"),
        (_unknown, r"masks/3.png has a pixel of value 7, and the 2 classes are 0 to 1"),
        (_coloured, r"masks/3.png is an image of mode RGB"),
        (_broken, r"masks/3.png is no readable mask"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    images, masks = _made(tmp_path)
    change(images, masks)
    with pytest.raises(DataError, match=message):
        segmentation(images, masks, CLASSES, (6, 8))
