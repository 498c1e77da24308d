"""The pages of docs/tasks: the stranger's model and the recipe of each run as they stand, to `predict`."""

from __future__ import annotations

import csv
import gzip
import re
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.edge_runtime import (
    Boxes,
    ClassMap,
    Labels,
    Prediction,
    Restored,
    Values,
    Vectors,
    encode_texts,
    load,
    load_sound,
    load_table,
    open_bundle,
    verify,
)
from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.inference.text_file import read_texts
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.runs.runner import run

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DOCS = Path(__file__).parents[1] / "docs" / "tasks"


@dataclass(frozen=True)
class Page:
    """A page of docs.

    Attributes:
        data: writes the files that the recipe names into a folder, and returns what `predict` is given.
        overrides: of the recipe, so that it takes seconds.
        holds: what is true of the answer.
    """

    data: Callable[[Path], Path]
    overrides: tuple[str, ...]
    holds: Callable[[Any], bool]


def _photos(folder: Path) -> Path:
    """Images that are bright on the left, on the right, or red, or any of these together."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    with (folder / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "left", "right", "red"])
        for number in range(120):
            shown = rng.integers(0, 2, 3)
            picture = rng.integers(0, 60, (32, 32, 3))
            picture[:, :16] += 120 * shown[0]
            picture[:, 16:] += 120 * shown[1]
            picture[:, :, 0] += 70 * shown[2]
            Image.fromarray(picture.astype(np.uint8)).save(folder / "photos" / f"{number}.png")
            table.writerow([f"{number}.png", *shown])
    return folder / "photos" / "7.png"


def _streets(folder: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(80):
        mask = np.zeros((40, 48), np.uint8)
        mask[20:] = 1
        mask[22:30, 8:20] = 2
        mask[0, :4] = 255
        picture = np.stack([mask % 255 * 80, 200 - mask % 255 * 60, mask % 255 * 20], axis=2) + rng.integers(0, 30)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder / "images" / "3.png"


def _page(folder: Path) -> Path:
    from PIL import Image

    from edgewright.pipeline.tasks.shipped.pages import draw_book

    page = draw_book(rows={"train": 3}, size=32, characters="AX", most=3).pages["train"].images[0, :, :, 0]
    Image.fromarray(page).resize((96, 64)).save(folder / "page.png")
    return folder / "page.png"


def _products(folder: Path) -> Path:
    """Folders of images of one colour each, at any brightness."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, colour in enumerate(([200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40])):
        (folder / "products" / str(number)).mkdir(parents=True)
        for view in range(20):
            picture = np.array(colour) * rng.uniform(0.5, 1.0) + rng.integers(0, 50, (40, 40, 3))
            Image.fromarray(picture.astype(np.uint8)).save(folder / "products" / str(number) / f"{view}.png")
    return folder / "products" / "2" / "3.png"


def _load(folder: Path) -> Path:
    """A load with a daily wave that follows the temperature."""
    rng = np.random.default_rng(0)
    hour = np.arange(400)
    temperature = np.sin(hour / 24 * 2 * np.pi) + 0.2 * rng.normal(size=400)
    lines = [f"{h},{100 + 20 * t + rng.normal():.3f},{t:.3f}" for h, t in zip(hour, temperature, strict=True)]
    (folder / "load.csv").write_text("\n".join(["hour,load,temperature", *lines]))
    (folder / "today.csv").write_text("\n".join(["temperature,load", *("0.5,110" for _ in range(30))]))
    return folder / "today.csv"


def _clothes(folder: Path) -> Path:
    """Four files as those of the set, of squares whose size is the class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "fashion").mkdir()
    for part, count in (("train", 300), ("t10k", 60)):
        kinds = (np.arange(count) % 10).astype(np.uint8)
        pictures = rng.integers(0, 40, (count, 28, 28), dtype=np.uint8)
        for picture, kind in zip(pictures, kinds, strict=True):
            picture[: 4 + 2 * kind, : 4 + 2 * kind] += 180
        for name, data in (("images-idx3", pictures), ("labels-idx1", kinds)):
            header = (0x800 + data.ndim, *data.shape)
            packed = gzip.compress(b"".join(number.to_bytes(4, "big") for number in header) + data.tobytes(), mtime=0)
            (folder / "fashion" / f"{part}-{name}-ubyte.gz").write_bytes(packed)
    Image.fromarray(pictures[3]).save(folder / "coat.png")
    return folder / "coat.png"


def _stripes(folder: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(80):
        stripes = np.zeros((32, 32, 3), np.uint8)
        stripes[rng.integers(0, 4) :: 4] = rng.integers(60, 256, 3)
        Image.fromarray(stripes).save(folder / "photos" / f"{number}.png")
    return folder / "photos" / "3.png"


def _reviews(folder: Path) -> Path:
    """Twenty words, of which those that come twice are good or bad."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(38))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    lines = ["label,text"]
    for number in range(240):
        good = number % 2
        chosen = [*rng.integers(10, 38, 6), *rng.integers(5 * good, 5 * good + 5, 2)]
        lines.append(f"{['bad', 'good'][good]}," + " ".join(f"w{i}" for i in rng.permutation(chosen)))
    (folder / "reviews.csv").write_text("\n".join(lines))
    (folder / "new.txt").write_text("w1 w20 w3\n\nw6 w7 w30 w31\n")
    return folder / "new.txt"


def _sounds(folder: Path) -> Path:
    """Tones, high and low, of another length and rate than the model's."""
    rng = np.random.default_rng(0)
    for name, pitch in (("high", 1500.0), ("low", 400.0)):
        (folder / "sounds" / name).mkdir(parents=True)
        for number in range(40):
            time = np.arange(9000) / 16000
            sound = 0.4 * np.sin(2 * np.pi * pitch * rng.uniform(0.8, 1.2) * time) + 0.1 * rng.normal(size=9000)
            with wave.open(str(folder / "sounds" / name / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
                file.writeframes((32767 * sound.clip(-1, 1)).astype("<i2").tobytes())
    return folder / "sounds" / "low" / "7.wav"


_SHORT = ("stages.0.epochs=2", "stages.1.target_steps=1", "stages.1.max_drop=1.0", "stages.1.retrain={epochs: 1}")

PAGES = {
    "audio_classification": Page(
        _sounds, _SHORT, lambda found: found.labels == ("high", "low") and found.label[0] == 1
    ),
    "detection": Page(
        _page,
        (*_SHORT, "task.args.rows={train: 96, calibration: 32, validation: 32, test: 32}"),
        lambda found: isinstance(found, Boxes) and found.labels == ("A", "X"),
    ),
    "embedding": Page(_products, _SHORT, lambda found: isinstance(found, Vectors) and found.vector.shape == (1, 32)),
    "fashion_mnist": Page(
        _clothes, _SHORT, lambda found: isinstance(found, Prediction) and found.labels[found.label[0]] in CLOTHES
    ),
    "multilabel": Page(
        _photos, _SHORT, lambda found: isinstance(found, Labels) and found.labels == ("left", "right", "red")
    ),
    "regression": Page(
        _load,
        _SHORT,
        lambda found: (
            isinstance(found, Values)
            and found.values.shape == (1, 4)
            and found.labels == ("load+1", "load+2", "load+3", "load+4")
            and found.unit == "MW"
            and 50 < found.values.min() < found.values.max() < 150
        ),
    ),
    "restoration": Page(
        _stripes,
        _SHORT,
        lambda found: isinstance(found, Restored) and found.pixels.shape == (1, 3, 32, 32),
    ),
    "text_classification": Page(
        _reviews, _SHORT, lambda found: found.labels == ("bad", "good") and found.label.shape == (2,)
    ),
    "segmentation": Page(
        _streets, _SHORT, lambda found: isinstance(found, ClassMap) and found.label.shape == (1, 32, 32)
    ),
}


def test_every_page_is_run() -> None:
    assert {page.stem for page in DOCS.glob("*.md")} == PAGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_model_and_the_recipe_of_the_page_run(name: str, tmp_path: Path) -> None:
    page = PAGES[name]
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)[:2])
    (tmp_path / "model.py").write_text(blocks["python"])
    assert blocks["yaml"].count("\n") <= 5 and blocks["python"].count("\n") <= 30
    (tmp_path / "recipe.yaml").write_text(blocks["yaml"])
    given = page.data(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", (*page.overrides, "benchmark.enabled=false", "threads=1"))
    result = run(recipe, tmp_path / "out")
    assert result.steps[2].macs < 0.7 * result.steps[1].macs
    assert result.bundle is not None
    verify(result.bundle).raise_if_failed()
    with load(result.bundle) as runner:
        from edgewright.edge_runtime.inference.image_file import load_image

        assert runner.manifest is not None
        if given.suffix == ".txt":
            with open_bundle(result.bundle) as bundle:
                found = runner.predict(encode_texts(read_texts(given), bundle))
        else:
            read = {".csv": load_table, ".wav": load_sound}.get(given.suffix, load_image)
            found = runner.predict(read(given, runner.manifest.preprocessing))
    assert page.holds(found)
    assert main(["predict", str(result.bundle), str(given), "--json", str(tmp_path / "said.json")]) == 0
