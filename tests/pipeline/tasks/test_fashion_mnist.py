"""Fashion-MNIST's files: read, dealt out, and refused by name where they are damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.shipped import fashion_mnist as under_test
from edgewright.pipeline.tasks.shipped.fashion_mnist import fashion_mnist


def _write(folder: Path, name: str, array: np.ndarray, packed: bool = True) -> Path:
    magic = 0x800 + array.ndim
    data = magic.to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()
    file = folder / (f"{name}-ubyte.gz" if packed else f"{name}-ubyte")
    file.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return file


def _made(folder: Path, packed: bool = True) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("train", 120), ("t10k", 40)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        if name == "t10k":
            images[0] = 7
        elif name == "train":
            images[:2] = 7
        _write(folder, f"{name}-images-idx3", images, packed)
        _write(folder, f"{name}-labels-idx1", (np.arange(count) % 10).astype(np.uint8), packed)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_the_files_become_four_splits_without_what_is_in_the_test_file(tmp_path: Path, packed: bool) -> None:
    task = fashion_mnist(str(_made(tmp_path, packed)))
    assert {name: len(split) for name, split in task.splits.items()}["test"] == 40
    assert sum(len(split) for split in task.splits.values()) == 40 + 118
    assert task.provenance["left_out_because_in_test"] == 2 and task.labels[9] == "ankle boot"
    batch = task.splits["train"].batch([0, 1])
    assert batch.inputs[0].shape == (2, 1, 28, 28) and len(task.file_digests) == 4
    few = fashion_mnist(str(tmp_path), most={"train": 20, "test": 10})
    assert len(few.splits["train"]) == 20 and len(few.splits["test"]) == 10


def test_where_the_package_is_not_installed_the_command_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(under_test, "_DEBIAN", tmp_path)
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        fashion_mnist()
    with pytest.raises(DataError, match="unpack the set there"):
        fashion_mnist(str(tmp_path / "none"))


def _other_magic(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").write_bytes((folder / "train-images-idx3-ubyte.gz").read_bytes())


def _truncated(folder: Path) -> None:
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-9]))


def _broken(folder: Path) -> None:
    file = folder / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:500])


def _fewer(folder: Path) -> None:
    _write(folder, "t10k-labels-idx1", np.zeros(39, np.uint8))


def _class(folder: Path) -> None:
    _write(folder, "t10k-labels-idx1", np.full(40, 12, np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_magic, "does not begin with the number 0x00000801"),
        (_truncated, r"says \[120, 28, 28\] bytes and holds 94071"),
        (_broken, "t10k-images-idx3-ubyte.gz cannot be read"),
        (_fewer, "has 40 images and .* 39 labels"),
        (_class, "row 0 has class 12 of 10"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change, message: str) -> None:
    change(_made(tmp_path))
    with pytest.raises(DataError, match=message):
        fashion_mnist(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not under_test._DEBIAN.is_dir(), reason="not here: apt install dataset-fashion-mnist")
def test_debians_package_holds_it() -> None:
    task = fashion_mnist()
    rows = {name: len(split) for name, split in task.splits.items()}
    assert rows["test"] == 10_000 and sum(rows.values()) == 70_000 - task.provenance["left_out_because_in_test"]
    assert task.preprocessing.mean[0] == pytest.approx(0.286, abs=2e-3)
