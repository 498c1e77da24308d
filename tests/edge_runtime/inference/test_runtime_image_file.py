"""One reader of image files: whatever the mode, training and the device see the same, or the file is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.edge_runtime import Manifest, load, open_bundle
from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import BundleError, InputError
from edgewright.edge_runtime.inference.image_file import load_image, read_depth, read_image
from edgewright.edge_runtime.inference.preprocess import preprocess_image

Image = pytest.importorskip("PIL.Image")

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RAMP = np.tile(np.linspace(0, 1, 32), (4, 1))


def made_for(channels: int = 3, max_value: float | None = None, **more: str) -> Preprocessing:
    return Preprocessing("image", (4, 32), channels, 1 / (max_value or 255), max_value=max_value, **more)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_eight_bits(tmp_path: Path, mode: str) -> None:
    made = Image.fromarray(RGB).convert(mode)
    made.save(tmp_path / "x.tif")
    expected = np.asarray(made.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "x.tif", made_for()), expected)
    grey = read_image(tmp_path / "x.tif", made_for(1))
    assert grey.shape == (20, 30, 1) and grey.dtype == np.uint8
    assert np.abs(grey[:, :, 0] - np.asarray(Image.fromarray(expected).convert("L"), float)).max() <= 1


def test_transparency_is_dropped_with_and_without_a_palette(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for transparency in (1, b"\xff\x10"):
        palette.save(tmp_path / "palette.png", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in ("clear", "palette"):
                assert (
                    np.unique(read_image(tmp_path / f"{name}.png", made_for()), axis=1).tolist() == [[[255, 0, 0]]] * 6
                )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8)))
    tags = Image.Exif()
    tags[0x0112] = orientation
    image.convert("RGB").save(tmp_path / f"x.{suffix}", exif=tags)
    with Image.open(tmp_path / f"x.{suffix}") as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / f"x.{suffix}", made_for()), upright)
    if suffix != "tif":  # Pillow turns those itself
        stored_way = read_image(tmp_path / f"x.{suffix}", made_for(orientation="ignored"))
        assert stored_way.shape == (32, 48, 3)


def test_a_damaged_exif_block_does_not_count(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9):
        Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=exif)
        assert read_image(tmp_path / "x.jpg", made_for()).shape == (20, 30, 3)


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    for suffix in ("gif", "png", "webp", "tiff", "mpo"):
        name = "phone.jpg" if suffix == "mpo" else f"x.{suffix}"
        first.save(tmp_path / name, suffix, save_all=True, append_images=[second])
        assert read_image(tmp_path / name, made_for())[0, 0].argmax() == 0, suffix


def deep_file(folder: Path, kind: str) -> tuple[Path, float, NDArray[np.float64]]:
    """A file of a ramp, its white, and its pixels in 0 ... 1."""
    white = {"float.tif": 1.0, "int32.tif": 60000.0, "ten.pgm": 1023.0, "plain.pgm": 4095.0}.get(kind, 65535.0)
    values = RAMP * white if kind == "float.tif" else np.rint(RAMP * white)
    file = folder / kind
    if file.suffix == ".pgm":
        shape, data = b"32 4 %d\n" % white, values.astype(">u2")
        text = " ".join(map(str, values.astype(int).ravel().tolist())).encode()
        file.write_bytes(b"P2 " + shape + text if kind == "plain.pgm" else b"P5 " + shape + data.tobytes())
    else:
        dtype = {"float.tif": "f4", "int32.tif": "i4", "big.tif": ">u2"}.get(kind, "<u2")
        Image.fromarray(values.astype(dtype)).save(file)
    return file, white, values / white


@pytest.mark.parametrize(
    "kind", ["x.png", "x.tif", "big.tif", "ten.pgm", "all.pgm", "plain.pgm", "int32.tif", "float.tif"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_files_keep_their_range(tmp_path: Path, kind: str, channels: int) -> None:
    file, white, expected = deep_file(tmp_path, kind)
    assert read_depth(file).white == (None if kind in ("int32.tif", "float.tif") else white)
    inputs = load_image(file, made_for(channels, white))
    np.testing.assert_allclose(inputs, np.broadcast_to(expected, inputs.shape), atol=1e-6)
    with pytest.raises(InputError, match=rf"{kind} has .* pixels, and 8 bits are expected"):
        read_image(file, made_for(channels))
    with pytest.raises(InputError, match=rf"{kind} has the pixel value .*, outside of 0 to {white / 2:g}"):
        read_image(file, made_for(channels, white / 2))


def test_fewer_bits_are_stretched_and_other_ranges_refused(tmp_path: Path) -> None:
    Image.fromarray(np.uint8([[0, 51, 255]])).save(tmp_path / "bytes.png")
    for white in (4095, 65535, 100000):
        preprocessing = dataclasses.replace(made_for(1, white), size=None)
        assert load_image(tmp_path / "bytes.png", preprocessing).ravel().tolist() == pytest.approx([0, 0.2, 1])
        file, _, expected = deep_file(tmp_path, "ten.pgm")
        np.testing.assert_allclose(load_image(file, preprocessing)[0, 0], expected, atol=2e-4)
    for name, values in (("negative", np.int32([[-1, 5]])), ("nan", np.float32([[0.5, np.nan]]))):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(InputError, match=rf"{name}.tif has the pixel value (-1|nan), outside of 0 to 4095"):
            load_image(tmp_path / f"{name}.tif", made_for(1, 4095))


@pytest.mark.parametrize(
    ("dtype", "white"), [("u1", None), ("<u2", 65535), (">u2", 4095), ("u1", 65535), ("i4", 70000)]
)
def test_an_array_is_what_its_file_is(tmp_path: Path, dtype: str, white: float | None) -> None:
    pixels = np.rint(RAMP * (255 if dtype == "u1" else white or 0)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    preprocessing = made_for(1, white)
    assert np.array_equal(load_image(tmp_path / "x.tif", preprocessing), preprocess_image(pixels, preprocessing))


@pytest.mark.parametrize(
    ("dtype", "white"), [("u2", None), ("i4", 65535), ("i8", 65535), ("i2", 4095), ("bool", None), ("f8", 65535)]
)
def test_arrays_of_a_dtype_that_does_not_fit_are_refused(dtype: str, white: float | None) -> None:
    with pytest.raises(InputError, match="an image for this model is uint8"):
        preprocess_image(np.ones((4, 4, 1), dtype), made_for(1, white))


def test_predict_takes_deep_images_where_the_manifest_says_so(bundle: Path, editable) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (9, 12, 3), dtype=np.uint16)
    with load(bundle) as runner, pytest.raises(InputError, match=r"is uint8 .* got uint16 .*trained with `max_value`"):
        runner.predict(deep)
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    preprocessing = dataclasses.replace(manifest.preprocessing, max_value=65535.0, scale=1 / 65535)
    editable(bundle, preprocessing=preprocessing)
    with load(bundle) as runner:
        from_array = runner.predict(deep).scores
        assert np.array_equal(from_array, runner.predict(preprocess_image(deep, preprocessing)).scores)
        with pytest.raises(InputError, match="uint8 or uint16"):
            runner.predict(deep.astype(np.int64))


@pytest.fixture
def editable():
    from edgewright.edge_runtime import write_manifest

    def edit(bundle: Path, **changes: object) -> None:
        with open_bundle(bundle) as opened:
            manifest = opened.manifest
        write_manifest(bundle, dataclasses.replace(manifest, **changes))

    return edit


def test_damaged_files_and_bombs_are_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    changed = bytearray(whole)
    changed[200] ^= 255
    for data in (whole[: len(whole) // 2], whole[:20], b"", b"hello", bytes(changed)):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(InputError, match=r"bad\.png cannot be read as an image"):
            read_image(tmp_path / "bad.png", made_for())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (lambda: read_image(tmp_path / "x.png", made_for()), lambda: read_depth(tmp_path / "x.png")):
        with pytest.raises(InputError, match=r"x\.png cannot be read as an image \(Image size .* bomb"):
            read()


def test_a_manifest_from_before_the_fields(bundle: Path) -> None:
    import json

    with open_bundle(bundle) as opened:
        data = json.loads(opened.manifest.to_json())
    assert data["preprocessing"]["orientation"] == "applied" and data["preprocessing"]["max_value"] is None
    for name in ("orientation", "alpha", "max_value"):
        del data["preprocessing"][name]
    old = Manifest.from_json(json.dumps(data)).preprocessing
    assert (old.orientation, old.alpha, old.max_value) == ("ignored", "dropped", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_value": 0.0}, "largest pixel value 0"),
        ({"max_value": 1e300}, "largest pixel value"),
        ({"orientation": "mirrored"}, "orientation 'mirrored'"),
        ({"alpha": "white"}, "alpha 'white'"),
    ],
)
def test_preprocessing_that_means_nothing(bundle: Path, editable, change: dict[str, object], message: str) -> None:
    with open_bundle(bundle) as opened:
        preprocessing = dataclasses.replace(opened.manifest.preprocessing, **change)
    with pytest.raises(BundleError, match=message):
        editable(bundle, preprocessing=preprocessing)
        open_bundle(bundle)


RAGGED = [
    [[0.1, 0.2], [0.3]],
    [[1.0], 2.0],
    [np.zeros((3, 6, 6)), np.zeros((3, 5, 6))],
    [10**400],
    ["a", "b"],
    None,
    {1, 2},
]


@pytest.mark.parametrize("value", RAGGED, ids=str)
def test_what_is_no_array_is_refused(bundle: Path, flat_bundle: Path, value: object) -> None:
    for place in (bundle, flat_bundle):
        with load(place) as runner:
            name = runner.inputs[0].name
            for call in (
                lambda: runner.predict(value),
                lambda: runner.predict({name: value}),  # noqa: B023
                lambda: runner.run({name: value}),  # noqa: B023
                lambda: runner.run_rows({name: value}),  # noqa: B023
            ):
                with pytest.raises(InputError, match=rf"input '{name}' is no array"):
                    call()
