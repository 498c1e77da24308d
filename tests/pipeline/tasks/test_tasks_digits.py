"""The digits: the same bits everywhere, and the device computes the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.edge_runtime.inference.preprocess import preprocess_image
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import batches, check_classes, data_digests
from edgewright.pipeline.tasks.shipped.digits import digits, raw_digits


def test_splits_are_disjoint_stratified_and_repeatable() -> None:
    task = digits()
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 1078,
        "calibration": 90,
        "validation": 270,
        "test": 359,
    }
    for name, split in task.splits.items():
        check_classes(task, name, "this test")
        counts = torch.bincount(split.targets)
        assert counts.max() - counts.min() <= max(3, 0.1 * int(counts.max()))
    assert data_digests(task) == data_digests(digits())
    assert data_digests(task) != data_digests(digits(seed=1))


def test_inputs_are_normalised_by_the_train_split() -> None:
    task = digits()
    (train,) = next(batches(task.splits["train"], 2000)).inputs
    assert train.shape == (1078, 1, 32, 32) and train.dtype == torch.float32
    assert abs(float(train.mean())) < 1e-4 and abs(float(train.std()) - 1) < 1e-4
    images, targets = raw_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    device = torch.from_numpy(preprocess_image(images, task.preprocessing))
    batch = next(batches(task.splits["test"], 5))
    for row, target in zip(batch.inputs[0], batch.targets, strict=True):
        same = (device == row).flatten(1).all(dim=1).nonzero().flatten().tolist()
        assert same and all(targets[i] == target for i in same)


def test_augmentation_uses_the_generator_only() -> None:
    task = digits(size=16)
    batch = next(batches(task.splits["train"], 64))
    torch.manual_seed(0)
    first = task.augment(batch, torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    again = task.augment(batch, torch.Generator().manual_seed(1))
    other = task.augment(batch, torch.Generator().manual_seed(2))
    assert torch.equal(first.inputs[0], again.inputs[0]) and not torch.equal(first.inputs[0], other.inputs[0])
    assert first.inputs[0].shape == batch.inputs[0].shape and torch.equal(first.targets, batch.targets)
    change = (first.inputs[0] - batch.inputs[0]).abs().mean()
    assert 0.05 < float(change) < 0.8
    assert digits(augment=False).augment(batch, torch.Generator()) is batch


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(DataError, match="size is 4"):
        digits(size=4)
    with pytest.raises(DataError, match="lack 'train'"):
        digits(fractions={"test": 1.0})
