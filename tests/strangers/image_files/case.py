"""Files of all the kinds that Pillow knows, as a folder of images hands them to a network."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.shipped.image_folder import image_folder

warnings.simplefilter("ignore")
COLOURS = np.zeros((20, 30, 3), np.uint8)
COLOURS[:10], COLOURS[10:, :15], COLOURS[10:, 15:] = (200, 40, 40), (30, 180, 60), (250, 250, 250)
RAMP = np.tile(np.linspace(0, 1, 30), (20, 1))


def inputs(write: Callable[[Path], object], suffix: str, channels: int = 3, **arguments: object) -> np.ndarray:
    """The one image that `write` writes, as the task gives it: [channels, 20, 30], 0 to 1."""
    folder = Path(tempfile.mkdtemp(dir="."))
    for split in ("train", "calibration", "validation", "test"):
        (folder / split / "a").mkdir(parents=True)
        write(folder / split / "a" / f"0{suffix}")
    args = {"channels": channels, "mean": [0] * channels, "std": [1] * channels, **arguments}
    return image_folder(folder, (20, 30), **args).splits["train"].batch([0]).inputs[0][0].numpy()


def check(
    name: str, write: Callable[[Path], object], suffix: str, expected: object, off: float = 0.004, **more
) -> None:
    """`expected` is [C, 20, 30], or a part of the message of a refusal."""
    try:
        got = inputs(write, suffix, **more)
    except DataError as error:
        right, seen = isinstance(expected, str) and expected in str(error) and f"0{suffix}" in str(error), f"{error}"
    except Exception as error:
        right, seen = False, f"{type(error).__name__}: {error}"
    else:
        distance = float("inf") if isinstance(expected, str) else float(np.abs(got - expected).max())
        right, seen = distance <= off, f"{distance:.4f} from what a viewer shows"
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())[-300:]}", flush=True)


def saved(image: Image.Image, **options: object) -> Callable[[Path], object]:
    return lambda file: image.save(file, **options)


colour = Image.fromarray(COLOURS)
shown = COLOURS.transpose(2, 0, 1) / 255
grey = np.asarray(colour.convert("L"))[None] / 255
for mode in ("RGB", "CMYK", "YCbCr", "RGBA", "LAB"):
    check(f"{mode} as colour", saved(colour.convert(mode)), ".tif", shown, off=0.03)
    check(f"{mode} as grey", saved(colour.convert(mode)), ".tif", grey, off=0.03, channels=1)
check("palette", saved(colour.convert("P", palette=Image.Palette.ADAPTIVE)), ".png", shown, off=0.02)
check("grey with alpha", saved(colour.convert("LA")), ".png", grey, channels=1)
check("one bit", saved(Image.fromarray(RAMP > 0.5)), ".png", (RAMP > 0.5) * np.ones((3, 1, 1)))
clear = Image.fromarray(np.dstack([COLOURS, np.zeros((20, 30), np.uint8)]))
check("transparent pixels keep their colour", saved(clear), ".png", shown)

for white, dtype in ((65535, "<u2"), (65535, ">u2")):
    deep = Image.fromarray((RAMP * white).astype(dtype))
    check(f"16 bits {dtype}", saved(deep), ".tif", RAMP[None], 1e-4, channels=1)
check("16 bits as colour", saved(deep), ".png", RAMP[None] * np.ones((3, 1, 1)), 1e-4)
twelve = Image.fromarray((RAMP * 4095).astype(np.uint16))
check("12 bits, declared", saved(twelve), ".png", RAMP[None], 3e-4, channels=1, max_value=4095)
check("16 bits where 12 were declared", saved(deep), ".png", "outside", channels=1, max_value=4095)
header = b"P5 30 20 4095\n" + (RAMP * 4095).astype(">u2").tobytes()
check("12 bits by the header", lambda file: file.write_bytes(header), ".pgm", RAMP[None], 3e-4, channels=1)
wide = Image.fromarray((RAMP * 60000).astype(np.int32))
check("32 bits", saved(wide), ".tif", "max_value", channels=1)
check("32 bits, declared", saved(wide), ".tif", RAMP[None], 1e-4, channels=1, max_value=60000)
check("32 bits beyond what was declared", saved(wide), ".tif", "60000", channels=1, max_value=4095)
check("below zero", saved(Image.fromarray((RAMP * 9 - 4).astype(np.int32))), ".tif", "-4", channels=1, max_value=9)
real = Image.fromarray(RAMP.astype(np.float32))
check("floats", saved(real), ".tif", "max_value", channels=1)
check("floats, declared", saved(real), ".tif", RAMP[None], 1e-6, channels=1, max_value=1)

TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}
for orientation, stored in TURNS.items():
    tags = Image.Exif()
    tags[0x0112] = orientation
    turned = Image.fromarray(np.ascontiguousarray(stored(COLOURS)))
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        options = {"quality": 100, "lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0}
        check(f"orientation {orientation} {suffix}", saved(turned, exif=tags, **options), suffix, shown, off=0.06)
check("a damaged orientation", saved(colour, exif=b"Exif\0\0MM??", quality=100, subsampling=0), ".jpg", shown, off=0.06)

other = Image.new("RGB", (30, 20), (0, 0, 255))
for kind, suffix in (("GIF", ".gif"), ("PNG", ".png"), ("TIFF", ".tif"), ("MPO", ".jpg")):
    options = {"format": kind, "save_all": True, "append_images": [other], "quality": 100, "subsampling": 0}
    check(f"two frames {suffix}", saved(colour, **options), suffix, shown, off=0.2)


def cut(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-5000])


for suffix in (".png", ".jpg", ".tif", ".bmp"):
    check(f"truncated {suffix}", cut, suffix, "cannot be read")
bomb = Image.new("1", (20000, 20000))
check("a bomb", saved(bomb), ".png", "bomb")
