"""Which classes a sample shows, and what of the loss is whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import tiny_task

from edgewright.pipeline.metric import IGNORED
from edgewright.pipeline.task import (
    ShowsClasses,
    TargetsInParts,
    data_digests,
    names_of_classes,
    presence,
    split_presence,
    target_parts,
)
from edgewright.pipeline.tasks.array_task import ArraySplit
from edgewright.pipeline.tasks.changed_split import ChangedSplit
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


class _InFiles(ArraySplit):
    """Cannot hold its targets."""

    most = 0

    @property
    def targets(self) -> torch.Tensor:
        raise AssertionError("all targets at once")

    def __len__(self) -> int:
        return len(self._targets)

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        self.most = max(self.most, len(rows))
        return self._targets[list(rows)]


class _Pixels(Segmentation):
    """Takes its splits as they are."""

    def __init__(self, split: ArraySplit) -> None:
        super().__init__({"test": (torch.zeros(3, 1, 2, 2), MAPS)}, ["sky", "road", "car"])
        self._splits = {"test": split}


def test_targets_that_are_not_held_are_looked_at_in_parts() -> None:
    maps = MAPS.repeat(50, 1, 1)
    images = torch.arange(150.0).reshape(150, 1, 1, 1).expand(150, 1, 2, 2)
    held, files = ArraySplit([images], maps), _InFiles([images], maps)
    assert isinstance(files, TargetsInParts) and not isinstance(held, TargetsInParts)
    assert torch.equal(torch.cat(list(target_parts(files))), maps) and files.most == 64
    assert torch.equal(split_presence(_Pixels(files), files), split_presence(_Pixels(held), held))
    assert data_digests(_Pixels(files)) == data_digests(_Pixels(held))
    fewer = _Pixels(files).of_classes([0, 2]).splits["test"]
    assert isinstance(fewer, ChangedSplit) and isinstance(fewer, TargetsInParts) and len(fewer) == 100
    assert torch.equal(torch.cat(list(target_parts(fewer))), _Pixels(held).of_classes([0, 2]).splits["test"].targets)
