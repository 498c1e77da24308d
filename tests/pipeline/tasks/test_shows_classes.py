"""Which classes a sample shows, and what of the loss is whose."""

from __future__ import annotations

import torch
from tiny import tiny_task

from edgewright.pipeline.metric import IGNORED
from edgewright.pipeline.task import ShowsClasses, names_of_classes, presence
from edgewright.pipeline.tasks.segmentation import Segmentation
from edgewright.pipeline.tasks.shipped.synthetic_regression import synthetic_regression

MAPS = torch.tensor([[[0, 0], [1, IGNORED]], [[2, 2], [2, 2]], [[IGNORED] * 2] * 2])


def _segmentation() -> Segmentation:
    return Segmentation({"train": (torch.zeros(3, 1, 2, 2), MAPS)}, ["sky", "road", "car"])


def test_a_map_shows_the_classes_of_its_pixels() -> None:
    task = _segmentation()
    assert isinstance(task, ShowsClasses) and names_of_classes(task) == ("sky", "road", "car") and task.labels == ()
    assert presence(task, MAPS).tolist() == [[True, True, False], [False, False, True], [False] * 3]


def test_a_row_of_one_class_has_that_one() -> None:
    task = tiny_task()
    found = presence(task, torch.tensor([2, IGNORED]))
    assert found.shape == (2, len(task.labels)) and found.nonzero().tolist() == [[0, 2]]
    assert names_of_classes(task) == tuple(task.labels) and not isinstance(task, ShowsClasses)
    assert names_of_classes(synthetic_regression()) == ()


def test_the_losses_of_the_classes_add_up_to_that_of_the_samples() -> None:
    task = _segmentation()
    logits = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    parts = [task.class_loss(logits, MAPS, index) for index in range(3)]
    each = [task.loss(logits[row : row + 1], MAPS[row : row + 1]) for row in (0, 1)]
    torch.testing.assert_close(sum(parts), sum(each) / 3)  # the third sample has no pixel with a class
    assert float(task.class_loss(logits[1:2], MAPS[1:2], 0)) == 0.0
