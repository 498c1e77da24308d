"""`verify --raw`: whose tensor is it, and at which step did it go another way?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from edgewright.edge_runtime import cli, open_bundle, write_manifest
from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.image_file import load_image
from edgewright.edge_runtime.proof.raw_check import check_raw
from edgewright.edge_runtime.proof.resampling import resample

Image = pytest.importorskip("PIL.Image")

SIZE = (32, 24)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(height: int = 80, width: int = 101) -> NDArray[np.uint8]:
    """Edges, gradients and texture, other ones in each channel."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 200, (-(-height // 9), -(-width // 9), 3)), np.ones((9, 9, 1)))[:height, :width]
    return np.clip(blocks + rng.integers(0, 56, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def place(bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle that takes 32 x 24, and a photograph."""
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    inputs = (dataclasses.replace(manifest.inputs[0], shape=(1, 3, *SIZE)),)
    preprocessing = Preprocessing("image", SIZE, 3, 1 / 255, MEAN, STD)
    write_manifest(bundle, dataclasses.replace(manifest, inputs=inputs, preprocessing=preprocessing))
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    return bundle, tmp_path / "photo.png"


def theirs(
    pixels: NDArray[np.uint8],
    *,
    bgr: bool = False,
    mode: str = "bilinear",
    antialias: bool = True,
    size: tuple[int, int] = SIZE,
    scale: float = 1 / 255,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> NDArray[np.float32]:
    """[3, H, W] by torch's own resizing."""
    x = torch.from_numpy(pixels[:, :, ::-1].copy() if bgr else pixels).permute(2, 0, 1)[None].float()
    smooth = {} if mode == "nearest" else {"antialias": antialias}
    x = interpolate(x, size, mode=mode, **smooth)[0] * scale
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).numpy()


def compared(place: tuple[Path, Path], tensor: NDArray[np.generic]):
    np.save(place[1].with_suffix(".npy"), tensor)
    (image,) = check_raw(place[0], [place[1]], place[1].with_suffix(".npy")).images
    return image, {step.name: step.yours for step in image.steps if step.yours != ""}


def test_the_same_is_the_same(place: tuple[Path, Path]) -> None:
    pixels = photograph()
    rounded = np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    as_torchvision = (rounded / 255 - MEAN) / STD
    for tensor in (theirs(pixels), theirs(pixels)[None], theirs(pixels).astype(np.float16)):
        image, differing = compared(place, tensor)
        assert image.same and not differing and image.verdict.startswith("same"), image.text()
    image, differing = compared(place, as_torchvision.transpose(2, 0, 1))
    assert image.same and "rounding" in image.verdict and 0.3 < image.largest < 1.5


ONE_CAUSE = {
    "bgr": ({"bgr": True}, "decoded", "BGR"),
    "no antialias": ({"antialias": False}, "resized", "without antialias"),
    "bicubic": ({"mode": "bicubic"}, "resized", "bicubic instead"),
    "bicubic without antialias": ({"mode": "bicubic", "antialias": False}, "resized", "INTER_CUBIC"),
    "nearest": ({"mode": "nearest"}, "resized", "INTER_NEAREST"),
    "another size": ({"size": (40, 24)}, "resized", "40 x 24, the model takes 32 x 24"),
    "not scaled": ({"scale": 1.0}, "scaled", "left in 0 ... 255"),
    "scaled twice": ({"scale": 1 / 255**2}, "scaled", "divided by 255 twice"),
    "no mean": ({"mean": (0, 0, 0)}, "mean", "not subtracted"),
    "no std": ({"std": (1, 1, 1)}, "std", "not divided"),
    "another mean": ({"mean": (0.4, 0.45, 0.5)}, "mean", "as if the mean were [0.4, 0.45, 0.5]"),
    "another std": ({"std": (0.3, 0.3, 0.3)}, "std", "as if the standard deviation were [0.3, 0.3, 0.3]"),
}


@pytest.mark.parametrize("name", ONE_CAUSE)
def test_one_step_that_differs_is_named(place: tuple[Path, Path], name: str) -> None:
    options, step, words = ONE_CAUSE[name]
    image, differing = compared(place, theirs(photograph(), **options))
    assert not image.same and image.first == step and list(differing) == [step], image.text()
    assert words in str(differing[step]) and words in image.verdict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.transpose(1, 2, 0), "channels last"),
        (lambda x: x.transpose(0, 2, 1), "width before height"),
        (lambda x: x[:, ::-1], "upside down"),
        (lambda x: x[:, :, ::-1], "mirrored"),
        (lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).reshape(x.shape), "reshaped"),
        (lambda x: np.concatenate([x, x[:1]]), "fourth channel"),
    ],
)
def test_another_layout_is_named(place: tuple[Path, Path], change, words: str) -> None:
    image, differing = compared(place, np.ascontiguousarray(change(theirs(photograph()))))
    assert list(differing) == ["layout"] and words in str(differing["layout"]), image.text()


def test_as_opencv_users_have_it(place: tuple[Path, Path]) -> None:
    tensor = theirs(photograph(), bgr=True, antialias=False, mean=(0, 0, 0), std=(1, 1, 1)).transpose(1, 2, 0)
    image, differing = compared(place, tensor)
    assert image.first == "decoded" and list(differing) == ["decoded", "resized", "mean", "std", "layout"], image.text()
    raw, differing = compared(place, photograph())
    assert list(differing) == ["resized", "scaled", "mean", "std", "layout"], raw.text()
    assert "not resized" in str(differing["resized"])


def test_as_caffe_users_have_it(place: tuple[Path, Path]) -> None:
    backwards = tuple(255 * value for value in MEAN[::-1])
    image, differing = compared(place, theirs(photograph(), bgr=True, scale=1, mean=backwards, std=(1, 1, 1)))
    assert image.first == "decoded" and list(differing) == ["decoded", "scaled", "mean", "std"], image.text()
    assert "[103.5, 116.3, 123.7] was subtracted" in str(differing["mean"])


def test_crops_and_letterboxes(place: tuple[Path, Path]) -> None:
    pixels = photograph().astype(np.float32)
    boxed = np.zeros((*SIZE, 3))
    boxed[6:25] = resample(pixels, (19, 24), "bilinear", True)
    for tensor, words in (
        (pixels[24:56, 38:62], "a crop of the centre without resizing"),
        (boxed, "letterbox"),
    ):
        image, differing = compared(place, ((tensor / 255 - MEAN) / STD).transpose(2, 0, 1))
        assert list(differing) == ["resized"] and words in str(differing["resized"]), image.text()


def test_the_centre_crop_of_torchvision(place: tuple[Path, Path]) -> None:
    bundle, file = place
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    preprocessing = dataclasses.replace(manifest.preprocessing, size=(32, 32))
    write_manifest(bundle, dataclasses.replace(manifest, preprocessing=preprocessing))
    for side, longer in ((37, 46), (32, 40)):
        shorter = Image.fromarray(photograph()).resize((longer, side), Image.Resampling.BILINEAR)
        top, left = round((side - 32) / 2), round((longer - 32) / 2)
        tensor = (np.asarray(shorter)[top : top + 32, left : left + 32] / 255 - MEAN) / STD
        image, differing = compared((bundle, file), tensor.transpose(2, 0, 1))
        words = f"the shorter side resized to {side}, then a crop of the centre"
        assert list(differing) == ["resized"] and words in str(differing["resized"]), image.text()


def test_orientation_and_transparency(place: tuple[Path, Path]) -> None:
    tags = Image.Exif()
    tags[0x0112] = 3
    pixels = photograph()
    Image.fromarray(pixels).save(place[1], exif=tags)
    image, differing = compared(place, theirs(pixels))
    assert list(differing) == ["decoded"] and "orientation 3 was ignored" in str(differing["decoded"]), image.text()
    alpha = np.zeros((80, 101, 1), np.uint8)
    alpha[20:60] = 255
    Image.fromarray(np.dstack([pixels, alpha])).save(place[1])
    image, differing = compared(place, theirs(np.where(alpha > 0, pixels, np.uint8(255))))
    assert list(differing) == ["decoded"] and "laid on white" in str(differing["decoded"]), image.text()


def test_sixteen_bits_that_were_cut_off(place: tuple[Path, Path]) -> None:
    bundle, file = place
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    deep = Preprocessing("image", SIZE, 1, 1 / 65535, (0.5,), (0.25,), max_value=65535.0)
    write_manifest(bundle, dataclasses.replace(manifest, preprocessing=deep))
    pixels = photograph()[:, :, 0].astype(np.uint16) * 200
    Image.fromarray(pixels).save(file)
    ours = load_image(file, deep)
    assert compared(place, ours)[0].same and compared(place, ours[0, 0])[0].same
    for divisor, words in ((255.0, "divided by 255"), (1.0, "left in 0 ... 65535")):
        resized = resample(pixels[:, :, None].astype(np.float32), SIZE, "bilinear", True)[:, :, 0]
        image, differing = compared(place, (resized / divisor - 0.5) / 0.25 if divisor > 1 else resized)
        assert words in str(differing["scaled"]), image.text()


def test_what_nothing_explains(place: tuple[Path, Path]) -> None:
    noise = np.random.default_rng(3).normal(size=(3, *SIZE)).astype(np.float32)
    image, differing = compared(place, noise)
    assert not image.same and image.first is None and set(differing.values()) == {None}
    assert "is it the same image?" in image.text()
    image, _ = compared(place, noise[:2])
    assert not image.same and "no image for this model has the tensor's shape" in image.verdict
    image, _ = compared(place, np.zeros((3, *SIZE), np.float32))
    assert not image.same and image.first is None


def test_an_image_of_one_colour_blames_nobody_without_need(place: tuple[Path, Path]) -> None:
    plain = np.full((80, 101, 3), (10, 120, 240), np.uint8)
    Image.fromarray(plain).save(place[1])
    assert compared(place, theirs(plain))[0].same
    assert compared(place, theirs(plain, bgr=True))[0].first == "decoded"
    assert compared(place, theirs(plain, scale=1.0))[0].first == "scaled"


def test_on_the_command_line(place: tuple[Path, Path], flat_bundle: Path, tmp_path: Path, capsys) -> None:
    bundle, file = place
    Image.fromarray(photograph()[::-1]).save(tmp_path / "second.png")
    files = [str(file), str(tmp_path / "second.png")]
    assert cli.main(["verify", str(bundle), "--raw", *files]) == 0
    assert "this is what the model is given" in capsys.readouterr().out
    rows = np.stack([theirs(photograph()), theirs(photograph()[::-1], bgr=True)])
    np.savez(tmp_path / "both.npz", image=rows)
    command = ["verify", str(bundle), "--raw", *files, "--tensor"]
    result = tmp_path / "r.json"
    assert cli.main([*command, str(tmp_path / "both.npz"), "--json", str(result)]) == 3
    out = capsys.readouterr().out
    assert "same" in out and "first step that differs: decoded: red and blue are swapped" in out
    data = json.loads(result.read_text())
    assert [image["first"] for image in data["images"]] == [None, "decoded"] and data["passed"] is False
    wrong = {
        "three.npy": (np.stack([rows[0]] * 3), "one row for each of the 2 images"),
        "nan.npy": (rows * np.nan, "NaN"),
        "text.npy": (np.array(["a"]), "no numbers"),
    }
    for name, (array, words) in wrong.items():
        np.save(tmp_path / name, array)
        assert cli.main([*command, str(tmp_path / name)]) == InputError.exit_code
        assert words in capsys.readouterr().err
    assert cli.main(["verify", str(bundle), "--tensor", str(tmp_path / "both.npz")]) == InputError.exit_code
    assert "--raw IMAGE" in capsys.readouterr().err
    assert cli.main(["verify", str(flat_bundle), "--raw", str(file)]) == InputError.exit_code
    assert "does not say how images become its input" in capsys.readouterr().err
