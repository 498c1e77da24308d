"""Image folders as strangers have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgewright.edge_runtime.inference.image_file import load_image
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import batches, data_digests
from edgewright.pipeline.tasks.input_files import FileSplit
from edgewright.pipeline.tasks.shipped.augmentation import flip_and_crop, random_affine
from edgewright.pipeline.tasks.shipped.image_folder import image_folder


def picture(file: Path, seed: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = {"RGB": (*size, 3), "RGBA": (*size, 4), "L": size, "I;16": size}[mode]
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(values * 256 if mode == "I;16" else values).save(file)
    return file


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog", "train")):
        for i in range(12):
            picture(tmp_path / name / f"{i}.png", 100 * label + i)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_class_folders_are_dealt_out_by_content(plain: Path, tmp_path: Path) -> None:
    task = image_folder(plain, 8)
    assert task.labels == ("cat", "dog", "train")
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 21, "calibration": 3, "validation": 6, "test": 6,
    }  # fmt: skip
    digests = data_digests(task)
    (plain / "cat" / "3.png").rename(plain / "cat" / "zz.png")
    (plain / "dog" / "copy.png").write_bytes((plain / "dog" / "5.png").read_bytes())
    again = image_folder(plain, 8)
    assert sum(map(len, again.splits.values())) == 37
    data_digests(again)
    kept = [set(task.splits[n].sample_digests) == set(again.splits[n].sample_digests) for n in task.splits]
    assert all(kept)
    assert data_digests(image_folder(plain, 8, seed=1)) != digests


def test_inputs_are_what_the_device_computes(plain: Path) -> None:
    picture(plain / "cat" / "0.png", 0, (30, 50))
    picture(plain / "cat" / "1.png", 1, mode="RGBA")
    picture(plain / "cat" / "2.png", 2, mode="L")
    for channels in (3, 1):
        task = image_folder(plain, (8, 6), channels=channels, memory_mb=channels - 1)
        split = task.splits["train"]
        assert isinstance(split, FileSplit)
        for _ in range(2):  # the second time from memory, where allowed
            for rows in ([0, 5, 0], torch.tensor([3]), range(len(split))):
                batch = split.batch(rows)
                assert batch.inputs[0].shape == (len(rows), channels, 8, 6)
                assert batch.inputs[0].dtype == torch.float32
                for x, row in zip(batch.inputs[0], rows, strict=True):
                    assert np.array_equal(x.numpy(), load_image(split.files[int(row)], task.preprocessing)[0])


def test_sixteen_bits_are_kept_and_the_manifest_says_so(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for i in range(4):
            picture(tmp_path / label / f"{i}.png", i, mode="I;16")
    task = image_folder(tmp_path, (9, 7), channels=1, mean=[0], std=[1])
    assert task.preprocessing.max_value == 65535 and task.preprocessing.scale == 1 / 65535
    split = task.splits["train"]
    assert isinstance(split, FileSplit)
    stored = np.asarray(Image.open(split.files[0]), np.float64)
    assert np.allclose(split.batch([0]).inputs[0][0, 0], stored / 65535, atol=1e-6)
    twelve = image_folder(tmp_path, (9, 7), channels=1, mean=[0], std=[1], max_value=4095)
    with pytest.raises(DataError, match=r"\d\.png has the pixel value \d+, outside of 0 to 4095"):
        twelve.splits["train"].batch([0])


def test_files_of_other_depths_are_named_or_stretched(tmp_path: Path) -> None:
    for i in range(5):
        values = np.full((8, 8), 10 * i + 10)
        for label in ("a", "b"):
            file = tmp_path / label / f"{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(values.astype(np.uint8) if i % 2 else (values * 257).astype(np.uint16)).save(file)
    with pytest.raises(DataError, match=r"1\.png has 8-bit pixels and .*0\.png 16-bit ones: give `max_value`"):
        image_folder(tmp_path, 8, channels=1)
    task = image_folder(tmp_path, 8, channels=1, max_value=65535, mean=[0], std=[1])
    for split in task.splits.values():
        assert isinstance(split, FileSplit)
        for row, file in enumerate(split.files):
            want = (10 * int(file.stem) + 10) / 255
            assert split.batch([row]).inputs[0].unique().tolist() == pytest.approx([want], abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_range_that_files_do_not_say_is_asked_for(tmp_path: Path, dtype: type) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8), i, dtype)).save(tmp_path / label / f"{i}.tif")
    with pytest.raises(DataError, match=r"0\.tif has .* pixels, and does not say which value stands for white"):
        image_folder(tmp_path, 8, channels=1)
    task = image_folder(tmp_path, 8, channels=1, max_value=3, mean=[0], std=[1])
    seen = {round(float(x), 6) for s in task.splits.values() for x in s.batch(range(len(s))).inputs[0].unique()}
    assert seen <= {0.0, 0.333333, 0.666667, 1.0} and len(seen) > 2


def test_a_bomb_is_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = presplit(tmp_path, train={"a": 3, "b": 3}, calibration={"a": 1}, validation={"a": 1}, test={"a": 1})
    picture(root / "train" / "b" / "bomb.png", 99, (60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png cannot be read as an image .*decompression bomb"):
        list(batches(image_folder(root, 8).splits["train"], 9))


def presplit(root: Path, **classes: dict[str, int]) -> Path:
    seed = 0
    for split, counts in classes.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed += 1
                picture(root / split / name / "deeper" / f"{i}.jpg", seed)
    return root


def test_split_folders(tmp_path: Path) -> None:
    two = {"a": 3, "b": 3}
    task = image_folder(presplit(tmp_path, train=two, calibration=two, val=two, test=two), 8)
    assert {name: len(split) for name, split in task.splits.items()} == dict.fromkeys(
        ("train", "calibration", "validation", "test"), 6
    )
    data_digests(task)


def test_missing_splits_are_cut_out_of_train(tmp_path: Path) -> None:
    root = presplit(tmp_path, train={"a": 16, "b": 16}, test={"a": 4})
    task = image_folder(root, 8)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 24, "calibration": 4, "validation": 4, "test": 4,
    }  # fmt: skip
    assert all("test" in file.parts for file in task.splits["test"].files)  # type: ignore[attr-defined]
    data_digests(task)
    assert set(image_folder(root, 8, fractions={"train": 1, "test": 1}).splits) == {"train", "test"}
    with pytest.raises(DataError, match="lack 'train', out of which calibration is to be cut"):
        image_folder(root, 8, fractions={"calibration": 1})


def test_labels_may_be_given_in_the_order_of_the_logits(plain: Path) -> None:
    task = image_folder(plain, 8, labels=["dog", "train", "cat"])
    split = task.splits["train"]
    assert isinstance(split, FileSplit)
    assert all(file.parent.name == task.labels[t] for file, t in zip(split.files, split.targets, strict=True))
    with pytest.raises(DataError, match=r"folder for the class 'cat' \(did you mean 'cats'\?\), which labels lacks"):
        image_folder(plain, 8, labels=["dog", "train", "cats"])
    with pytest.raises(DataError, match="class 'cow' has no image"):
        image_folder(plain, 8, labels=["dog", "train", "cat", "cow"])


def test_a_class_without_samples_is_named(plain: Path) -> None:
    (plain / "empty").mkdir()
    (plain / "empty" / "readme.txt").write_text("")
    with pytest.raises(DataError, match=r"class 'empty' has no image in .* add files"):
        image_folder(plain, 8)


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class 'b' has no image in .* \(split 'train'\)"):
        image_folder(presplit(tmp_path, train={"a": 8}, test={"a": 2, "b": 2}), 8)


def test_a_stray_folder_beside_the_splits_is_named(tmp_path: Path) -> None:
    root = presplit(tmp_path, train={"a": 8}, tset={"a": 2})
    with pytest.raises(DataError, match=r"beside it 'tset' \(did you mean 'test'\?\)"):
        image_folder(root, 8)


def corrupt(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [corrupt, lambda f: f.write_bytes(b""), lambda f: f.write_text("hello")])
def test_a_corrupt_file_is_named(tmp_path: Path, damage: object) -> None:
    root = presplit(tmp_path, train={"a": 3, "b": 3}, calibration={"a": 1}, validation={"a": 1}, test={"a": 1})
    bad = picture(root / "train" / "b" / "bad.png", 99, (60, 60))
    damage(bad)  # type: ignore[operator]
    split = image_folder(root, 8).splits["train"]
    with pytest.raises(DataError, match=r"bad.png cannot be read as an image .*; repair it or remove it"):
        list(batches(split, 3))


def test_a_file_that_vanishes_is_named(plain: Path) -> None:
    split = image_folder(plain, 8, memory_mb=0).splits["train"]
    assert isinstance(split, FileSplit)
    split.files[0].unlink()
    with pytest.raises(DataError, match=split.files[0].name):
        split.batch([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": "big"}, "size is 'big'"),
        ({"channels": 4}, "channels is 4"),
        ({"max_value": 0}, "max_value is 0"),
        ({"max_value": float("nan")}, "max_value is nan"),
        ({"max_value": "16 bits"}, "max_value is '16 bits'"),
        ({"mean": [0.5]}, "need 3 numbers each"),
        ({"std": [1, 0, 1]}, "those of std above 0"),
    ],
)
def test_arguments_that_make_no_sense(plain: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_folder(plain, **options)  # type: ignore[arg-type]


def test_no_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "loose.png", 1)
    with pytest.raises(DataError, match="holds no class folders"):
        image_folder(tmp_path, 8)


def test_flip_and_crop_by_hand() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5) + 1
    many = x[:1].repeat(400, 1, 1, 1)
    flipped = flip_and_crop(True, 0)(many, torch.Generator().manual_seed(0))
    same = (flipped == many).flatten(1).all(1)
    mirrored = (flipped == many.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 150 < int(same.sum()) < 250
    moved = flip_and_crop(False, 1)(many, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
    windows = [padded[:, r : r + 4, c : c + 5] for r in range(3) for c in range(3)]
    hits = [sum(torch.equal(row, window) for row in moved) for window in windows]
    assert sum(hits) == 400 and min(hits) > 15


def test_random_affine_without_range_is_the_identity() -> None:
    x = torch.randn(3, 2, 6, 8)
    y = random_affine(0.0, 0.0, 0.0)(x, torch.Generator().manual_seed(0))
    assert torch.allclose(x, y, atol=1e-5)
