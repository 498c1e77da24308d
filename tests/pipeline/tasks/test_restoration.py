"""Images that are given back: what is done to them, what is judged, which folders are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_noisy
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import data_digests
from edgewright.pipeline.tasks.restoration import Degradation, ImageQuality, Restoration
from edgewright.pipeline.tasks.shipped.restoration import restoration
from edgewright.pipeline.tasks.shipped.synthetic_restoration import synthetic_restoration


def images(folder: Path, count: int = 20, side: int = 24) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (side // 4, side // 4, 3)), 4, 0), 4, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_noise_belongs_to_the_image_and_not_to_the_batch(tmp_path: Path) -> None:
    task = restoration(images(tmp_path / "good"), size=24, noise=0.1, seed=3)
    split = task.splits["train"]
    whole = split.batch(range(len(split)))
    alone = split.batch([4])
    assert torch.equal(alone.inputs[0][0], whole.inputs[0][4]) and torch.equal(alone.targets[0], whole.targets[4])
    off = whole.inputs[0] - whole.targets
    assert 0.05 < float(off.std()) < 0.11 and float(whole.inputs[0].min()) >= 0.0
    again = restoration(tmp_path / "good", size=24, noise=0.1, seed=4).splits["train"].batch([0])
    assert not torch.equal(again.inputs[0][0], whole.inputs[0][0])


def test_what_is_read_is_smaller_by_the_scale(tmp_path: Path) -> None:
    task = restoration(images(tmp_path / "good"), size=6, scale=4)
    batch = task.splits["test"].batch([0, 1])
    assert batch.inputs[0].shape == (2, 3, 6, 6) and batch.targets.shape == (2, 3, 24, 24)
    assert torch.allclose(batch.targets[:, :, ::4, ::4], batch.inputs[0], atol=1e-6), "squares of one colour"
    assert task.preprocessing.size == (6, 6) and task.preprocessing.mean == (0.0, 0.0, 0.0)


def test_pairs_are_files_of_one_name(tmp_path: Path) -> None:
    good, worse = images(tmp_path / "good"), tmp_path / "worse"
    worse.mkdir()
    for file in good.iterdir():
        with Image.open(file) as image:
            image.resize((12, 12)).save(worse / file.name)
    task = restoration(good, worse, size=12, scale=2)
    batch = task.splits["train"].batch([0])
    assert batch.inputs[0].shape[2:] == (12, 12) and batch.targets.shape[2:] == (24, 24)
    assert len({file for split in task.splits.values() for file in split.file_digests}) == 40  # type: ignore[attr-defined]
    before = data_digests(task)
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(worse / "5.png")
    assert data_digests(restoration(good, worse, size=12, scale=2)) != before, "keys hold what the model reads"
    with pytest.raises(DataError, match=r"degraded_path is .*good too"):
        restoration(good, good, size=12)
    with pytest.raises(DataError, match="which makes 12 x 12 with scale 1"):
        restoration(good, worse, size=12)
    with pytest.raises(DataError, match="give one of both"):
        restoration(good, worse, noise=0.1)
    (worse / "7.png").rename(worse / "77.png")
    with pytest.raises(DataError, match=r"7\.png has no partner in .*worse"):
        restoration(good, worse, size=12, scale=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"metric": "lpips"}, "unknown metric 'lpips'"),
        ({"loss": "huber"}, "unknown loss 'huber'"),
        ({"size": -1}, "size is -1"),
        ({"size": 5, "scale": 2, "metric": "ssim"}, r"\[10, 10\] pixels are too small for ssim"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        restoration(images(tmp_path / "good", 8), **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no folder"):
        restoration(tmp_path / "none")


def test_metrics_are_torchmetrics_of_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(6, 1, 16, 16, generator=generator)
    said = right + 0.1 * torch.randn(6, 1, 16, 16, generator=generator)
    for name, judge in (
        ("psnr", PeakSignalNoiseRatio(1.0)),
        ("ssim", StructuralSimilarityIndexMeasure(data_range=1.0)),
    ):
        score = ImageQuality(name).score([(said[:4], right[:4]), (said[4:], right[4:])])  # type: ignore[list-item]
        expected = []
        for row in range(6):
            expected.append(float(judge(said[row : row + 1].clamp(0, 1), right[row : row + 1])))
            judge.reset()
        assert score.value == pytest.approx(np.mean(expected), rel=1e-5) and score.each is not None
        np.testing.assert_allclose(score.each, expected, rtol=1e-5)
    assert ImageQuality("psnr").drop(30.0, 29.7) == pytest.approx(0.01)
    assert ImageQuality("ssim").drop(0.9, 0.8) == pytest.approx(0.1)
    assert ImageQuality("psnr").score([(right, right)]).value == 100.0  # type: ignore[list-item]
    with pytest.raises(DataError, match="too small for ssim"):
        ImageQuality("ssim").score([(right[:, :, :8], right[:, :, :8])])  # type: ignore[list-item]


def test_a_model_of_another_size_is_refused_by_its_shape() -> None:
    task = tiny_noisy()
    batch = task.splits["train"].batch([0, 1])
    with pytest.raises(
        DataError, match=r"returns \[2, 1, 8, 8\], and the images to be given back are \[2, 1, 16, 16\]"
    ):
        task.loss(batch.inputs[0][:, :, ::2, ::2], batch.targets)


def test_the_pages_that_are_made_up_have_their_noise_on_every_machine() -> None:
    rows = {"train": 4, "calibration": 2, "validation": 2, "test": 2}
    a, b = (synthetic_restoration(rows=rows, size=32, scale=2) for _ in range(2))  # type: ignore[arg-type]
    assert isinstance(a, Restoration) and Degradation(2, 0.2).scale == 2
    one, other = a.splits["train"].batch([0, 1]), b.splits["train"].batch([0, 1])
    assert torch.equal(one.inputs[0], other.inputs[0]) and one.inputs[0].shape == (2, 1, 16, 16)
    assert one.targets.shape == (2, 1, 32, 32)
