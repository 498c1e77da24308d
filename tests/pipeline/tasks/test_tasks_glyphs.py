"""The glyphs: no font in two splits, no symbol fonts, the same bits every time."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from edgewright.edge_runtime.inference.preprocess import preprocess_image
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import batches, check_classes, data_digests
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.shipped.fonts import Font, UnusableFontError, check_font, deal, draw, find_fonts
from edgewright.pipeline.tasks.shipped.glyphs import CHARACTERS, glyphs
from edgewright.pipeline.tasks.shipped.raw_images import RawImages, moments

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
ROWS = {"train": 3, "calibration": 1, "validation": 1, "test": 2}


@pytest.fixture(scope="module")
def task() -> ImageClassification:
    return glyphs(size=16, rows=ROWS, system_fonts=False)  # type: ignore[arg-type]


def test_splits_have_every_class_and_share_no_font(task: ImageClassification) -> None:
    assert len(CHARACTERS) == 62 and task.labels == tuple(CHARACTERS)
    assert {name: len(split) for name, split in task.splits.items()} == {n: 62 * r for n, r in ROWS.items()}
    for name, split in task.splits.items():
        check_classes(task, name, "this test")
        assert bool((torch.bincount(split.targets) == ROWS[name]).all())
    fonts = task.provenance["fonts"]
    assert fonts["calibration"] == fonts["validation"]
    for one, other in itertools.combinations(("train", "validation", "test"), 2):
        assert fonts[one] and not fonts[one].keys() & fonts[other].keys()
        assert not set(fonts[one].values()) & set(fonts[other].values())
    families = {name.split()[0] for part in fonts.values() for name in part}
    assert {"DejaVu", "STIXGeneral", "cmr10", "cmtt10"} <= families


def test_same_seed_same_bits_and_the_fonts_are_part_of_the_digest(task: ImageClassification) -> None:
    digests = data_digests(task)
    again = glyphs(size=16, rows=ROWS, system_fonts=False)  # type: ignore[arg-type]
    assert data_digests(again) == digests
    other = data_digests(glyphs(seed=1, size=16, rows=ROWS, system_fonts=False))  # type: ignore[arg-type]
    assert all(other[name] != digests[name] for name in digests)
    moved = ImageClassification(task.splits, task.labels, provenance={"fonts": {}})  # type: ignore[arg-type]
    changed = data_digests(moved)
    assert {name for name in digests if changed[name] != digests[name]} == {"provenance"}


def test_images_are_normalised_and_vary(task: ImageClassification) -> None:
    (train,) = next(batches(task.splits["train"], 1000)).inputs
    assert train.shape == (186, 1, 16, 16) and train.dtype == torch.float32
    assert abs(float(train.mean())) < 1e-3 and abs(float(train.std()) - 1) < 1e-3
    spread = train.view(62, 3, -1).std(dim=1).mean()
    assert float(spread) > 0.3, "images of one class differ"
    batch = task.splits["test"].batch([5, 0])
    images = task.splits["test"].images[[5, 0]]  # type: ignore[attr-defined]
    assert torch.equal(batch.inputs[0], torch.from_numpy(preprocess_image(images, task.preprocessing)))
    assert batch.targets.tolist() == [2, 0]


def test_case_shows_in_size_and_place() -> None:
    o, capital, tail = draw(FONTS / "DejaVuSans.ttf", "oOp", 64)
    height = [int((picture.max(axis=1) > 0).sum()) for picture in (o, capital)]
    assert height[0] < 0.85 * height[1]
    bottom = [int((picture.max(axis=1) > 0).nonzero()[0].max()) for picture in (o, tail)]
    assert bottom[1] > bottom[0] + 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LastResortHE-Regular.ttf", "draws '1' like '0'"),
        ("STIXNonUni.ttf", "blank"),
        ("cmsy10.ttf", "a symbol font"),
    ],
)
def test_fonts_that_cannot_draw_the_characters_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnusableFontError, match=message):
        check_font(FONTS / name, CHARACTERS)


def test_tofu_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFontError, match="has no glyph for"):
        check_font(FONTS / "DejaVuSans.ttf", "AB\u3042")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes((FONTS / "cmr10.ttf").read_bytes()[:500])
    with pytest.raises(UnusableFontError, match="cannot be read"):
        check_font(broken, CHARACTERS)


def test_installed_fonts_are_found_and_copies_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fonts" / "truetype"
    folder.mkdir(parents=True)
    shutil.copy(FONTS / "cmr10.ttf", folder / "a_copy.ttf")
    (folder / "no_font.ttf").write_bytes(b"not a font")
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    alone, _ = find_fonts("ABC", False, 0, 100)
    found, refused = find_fonts("ABC", True, 0, 100)
    assert found == alone and "cannot be read" in refused["no_font.ttf"]
    assert len(find_fonts("ABC", True, 0, 5)[0]) == 5


def test_fonts_are_dealt_out_by_family() -> None:
    fonts = [Font(family, str(i), Path("x"), f"{family}{i}") for family in "abcd" for i in range(5)]
    parts = deal(fonts, {"train": 3, "validation": 1, "test": 1}, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "validation": 4, "test": 4}
    for part in parts.values():
        assert {font.family for font in part} == set("abcd")
    assert deal(fonts, {"train": 3, "validation": 1, "test": 1}, 1) != parts
    with pytest.raises(DataError, match="4 usable fonts are too few"):
        deal(fonts[:4], {"train": 3, "validation": 1, "test": 1}, 0)


def test_moments_do_not_depend_on_the_chunks() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
    mean, std = moments(images, chunk=7)
    assert (mean, std) == moments(images)
    assert np.allclose(mean, images.mean(axis=(0, 1, 2)) / 255, atol=1e-6)
    assert np.allclose(std, images.std(axis=(0, 1, 2)) / 255, atol=1e-6)


def test_equal_images_have_equal_digests(task: ImageClassification) -> None:
    images = task.splits["test"].images[:3]  # type: ignore[attr-defined]
    split = RawImages(images[[0, 1, 0]], np.array([0, 1, 0]), task.preprocessing)
    first, second, third = split.sample_digests
    assert first == third != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "size is 4"),
        ({"characters": "AA"}, "two or more different"),
        ({"rows": {"test": 3}}, "lack 'train'"),
        ({"rows": {"train": 0}}, "at least 1 image"),
        ({"max_fonts": 3}, "3 usable fonts are too few"),
        ({"characters": "A\u3042"}, r"0 usable fonts are too few[\s\S]*ttf: it has no glyph"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        glyphs(system_fonts=False, **arguments)  # type: ignore[arg-type]
