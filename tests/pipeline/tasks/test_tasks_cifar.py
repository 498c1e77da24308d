"""CIFAR in the original binary format, on small files that the tests write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from recipes_on_disk import without_later_phases

from edgewright.pipeline.cli import RECIPES
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.runs import runner
from edgewright.pipeline.stages.class_aware_pruning.report import class_counts
from edgewright.pipeline.store.cache import read_artifacts
from edgewright.pipeline.task import batches, check_classes, data_digests
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.tasks.shipped.augmentation import flip_and_crop
from edgewright.pipeline.tasks.shipped.cifar import cifar


def rows(seed: int, labels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels[0]), 3072), np.uint8)
    return np.concatenate([*(column[:, None] for column in labels), pixels], axis=1)


def ten(folder: Path, repeat_test: bool = False) -> Path:
    """20 images per training file, 30 in the test file."""
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(f"thing{i}" for i in range(10)) + "\n\n")
    for number in range(1, 6):
        rows(number, [np.arange(20, dtype=np.uint8) % 10]).tofile(folder / f"data_batch_{number}.bin")
    rows(1 if repeat_test else 9, [np.arange(30, dtype=np.uint8) % 10]).tofile(folder / "test_batch.bin")
    return folder


def hundred(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "coarse_label_names.txt").write_text("\n".join(f"kind{i}" for i in range(20)))
    (folder / "fine_label_names.txt").write_text("\n".join(f"thing{i}" for i in range(100)))
    for seed, name, count in ((1, "train.bin", 400), (2, "test.bin", 100)):
        fine = (np.arange(count) % 100).astype(np.uint8)
        rows(seed, [fine // 5, fine]).tofile(folder / name)
    return folder


def test_cifar10_as_it_lies_on_disk(tmp_path: Path) -> None:
    folder = ten(tmp_path / "cifar-10-batches-bin")
    task = cifar(str(tmp_path))
    assert task.name == "cifar-10" and task.labels == tuple(f"thing{i}" for i in range(10))
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 70, "calibration": 10, "validation": 20, "test": 30,
    }  # fmt: skip
    for name, split in task.splits.items():
        check_classes(task, name, "this test")
        assert len(split.sample_digests) == len(split)
    raw = np.fromfile(folder / "test_batch.bin", np.uint8).reshape(30, 3073)
    batch = task.splits["test"].batch([7, 3])
    assert batch.targets.tolist() == [7, 3]
    red = (raw[7, 1:1025].reshape(32, 32) / 255 - 0.4915) / 0.2470
    blue = (raw[7, 2049:].reshape(32, 32) / 255 - 0.4464) / 0.2616
    assert np.allclose(batch.inputs[0][0, 0], red, atol=1e-5) and np.allclose(batch.inputs[0][0, 2], blue, atol=1e-5)
    expected = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.bin")}
    assert task.provenance == {"files": expected, "left_out_because_in_test": 0}
    assert data_digests(task) == data_digests(cifar(str(folder)))
    assert data_digests(cifar(str(folder), seed=1))["train"] != data_digests(task)["train"]


def test_cifar100_fine_and_coarse(tmp_path: Path) -> None:
    hundred(tmp_path / "cifar-100-binary")
    shares = {"train": 0.5, "validation": 0.5}
    fine = build_task("cifar", {"path": "cifar-100-binary", "fractions": shares}, tmp_path)
    assert len(fine.labels) == 100 and fine.labels[41] == "thing41"
    assert {name: len(split) for name, split in fine.splits.items()} == {"train": 200, "validation": 200, "test": 100}
    coarse = cifar(str(tmp_path), classes=20)
    assert len(coarse.labels) == 20
    assert coarse.splits["test"].targets.tolist() == [c // 5 for c in fine.splits["test"].targets.tolist()]


def test_training_images_of_the_test_file_are_left_out(tmp_path: Path) -> None:
    ten(tmp_path / "x", repeat_test=True)
    task = cifar(str(tmp_path / "x"))
    assert task.provenance["left_out_because_in_test"] == 20
    assert sum(len(split) for name, split in task.splits.items() if name != "test") == 80
    assert set(data_digests(task)) == {"train", "calibration", "validation", "test", "provenance"}


def test_augmentation_pads_with_black(tmp_path: Path) -> None:
    task = cifar(str(ten(tmp_path / "x")))
    (batch,) = batches(task.splits["train"], 100)
    moved = task.augment(batch, torch.Generator().manual_seed(0)).inputs[0]
    black = torch.tensor([-0.4915 / 0.2470, -0.4821 / 0.2435, -0.4464 / 0.2616])
    edges = torch.cat([moved[:, :, 0], moved[:, :, -1]]).transpose(1, 2)
    assert int(torch.isclose(edges, black).all(dim=2).sum()) > 500
    same = flip_and_crop(False, 0)(batch.inputs[0], torch.Generator().manual_seed(0))
    assert torch.equal(same, batch.inputs[0])


def truncate(folder: Path) -> None:
    file = folder / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-100])


def wrong_label(folder: Path) -> None:
    file = folder / "data_batch_2.bin"
    content = bytearray(file.read_bytes())
    content[3073 * 4] = 12
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"data_batch_3.bin has 61360 bytes, which is no whole number of rows of 3073"),
        (wrong_label, r"data_batch_2.bin: row 4 has class 12 of 10"),
        (lambda folder: (folder / "data_batch_5.bin").unlink(), "lacks data_batch_5.bin"),
        (lambda folder: (folder / "batches.meta.txt").write_text("one\ntwo"), "names 2 classes"),
    ],
)
def test_damaged_files_are_named(damage: object, message: str, tmp_path: Path) -> None:
    folder = ten(tmp_path / "x")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        cifar(str(folder))


def test_hashes_and_places_are_checked(tmp_path: Path) -> None:
    folder = ten(tmp_path / "cifar-10-batches-bin")
    good = hashlib.sha256((folder / "test_batch.bin").read_bytes()).hexdigest()
    assert len(cifar(str(folder), sha256={"test_batch.bin": good.upper()}).splits) == 4
    with pytest.raises(DataError, match=r"test_batch.bin: sha256 is .* expected 00"):
        cifar(str(folder), sha256={"test_batch.bin": "00"})
    with pytest.raises(DataError, match="holds no cifar-100-binary"):
        cifar(str(folder), classes=100)
    with pytest.raises(DataError, match="classes is 7"):
        cifar(str(folder), classes=7)
    with pytest.raises(DataError, match="cannot have 'test'"):
        cifar(str(folder), fractions={"train": 0.5, "test": 0.5})
    hundred(tmp_path / "cifar-100-binary")
    with pytest.raises(DataError, match="both data sets"):
        cifar(str(tmp_path))


@pytest.mark.slow
def test_published_recipe_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)
    ten(tmp_path / "cifar-10-batches-bin")
    training = {"epochs": 1, "batch_size": 32}
    changes = [
        f"task.args.path={tmp_path}",
        "model={name: 'zoo:resnet_small', args: {in_channels: 3, widths: [4, 8], blocks: 1}}",
        "stages.0.epochs=1",
        *(f"stages.1.{name}.{key}={v}" for name in ("prepare", "retrain", "finetune") for key, v in training.items()),
        "stages.1.max_drop=1.0",
        "stages.1.max_iterations=1",
        "stages.1.threshold_frac=1.01",
    ]
    recipe = load_recipe(RECIPES / "cifar10_resnet56.yaml", changes)
    result = runner.run(recipe, tmp_path / "out")
    metrics = result.steps[-1].metrics
    assert metrics["criterion"] == "class_count" and metrics["stopped"] == "max_iterations"
    assert metrics["macs"] < metrics["macs_before"]
    arrays = read_artifacts(tmp_path / "out" / result.steps[-1].checkpoint)
    counts = class_counts(arrays, [f"thing{i}" for i in range(10)])
    assert counts is not None and len(counts["layer"]["table"]) == 10
