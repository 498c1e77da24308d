"""Tensors that people made of a photograph with other code than ours: `verify --raw` says where they part."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from edgewright.edge_runtime import cli
from edgewright.pipeline import load_recipe, run

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def verify(tensor: np.ndarray, *files: str) -> tuple[int, str]:
    np.save("mine.npy", tensor)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(["verify", "out/bundle", "--raw", *(files or ("photo.png",)), "--tensor", "mine.npy"])
    return code, out.getvalue()


def check(name: str, tensor: np.ndarray, code: int, *words: str) -> None:
    got, text = verify(np.ascontiguousarray(tensor).astype(np.float32))
    right = got == code and all(word in text for word in words)
    print("right" if right else "wrong", f"{name}: exit {got} {' '.join(text.split())[-250:]}", flush=True)


rng = np.random.default_rng(3)
for label in ("a", "b"):
    Path("photos", label).mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(f"photos/{label}/{i}.png")
with contextlib.redirect_stdout(io.StringIO()):
    run(load_recipe("recipe.yaml"), out="out")

photo = np.kron(rng.integers(0, 200, (8, 9, 3)), np.ones((7, 7, 1))) + rng.integers(0, 56, (56, 63, 3))
photo = photo.astype(np.uint8)
Image.fromarray(photo).save("photo.png")


def resized(pixels: np.ndarray, **how: object) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    return interpolate(x, (16, 16), **{"mode": "bilinear", "antialias": True, **how})[0].permute(1, 2, 0).numpy()


def normal(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


check("the same", normal(resized(photo)), 0, "same")
check("the same with a batch axis", normal(resized(photo))[None], 0, "same")
pillow = np.asarray(Image.fromarray(photo).resize((16, 16), Image.Resampling.BILINEAR))
check("rounded by Pillow", normal(pillow), 0, "same", "rounding")
check("BGR", normal(resized(photo[:, :, ::-1])), 3, "first step that differs: decoded", "BGR")
check("no antialias", normal(resized(photo, antialias=False)), 3, "first step that differs: resized", "antialias")
check("bicubic", normal(resized(photo, mode="bicubic")), 3, "first step that differs: resized", "bicubic")
check("not divided by 255", normal(255 * resized(photo)), 3, "first step that differs: scaled", "255")
check("neither mean nor std", resized(photo).transpose(2, 0, 1) / 255, 3, "first step that differs: mean", "subtracted")
check("no std", normal(resized(photo)) * STD[:, None, None], 3, "first step that differs: std")
check("channels last", normal(resized(photo)).transpose(1, 2, 0), 3, "first step that differs: layout", "channels last")
centred = resized(photo).transpose(2, 0, 1) / 127.5 - 1
check("-1 to 1", centred, 3, "first step that differs: mean", "0.5")
side = Image.fromarray(photo).resize((18 * 63 // 56, 18), Image.Resampling.BILINEAR)
left, top = round((side.width - 16) / 2), round((side.height - 16) / 2)
check(
    "a crop", normal(np.asarray(side)[top : top + 16, left : left + 16]), 3, "first step that differs: resized", "crop"
)
tags = Image.Exif()
tags[0x0112] = 3
Image.fromarray(photo).save("photo.png", exif=tags)
check("turned", normal(resized(photo)), 3, "first step that differs: decoded", "orientation")
check("another image", rng.normal(size=(3, 16, 16)), 3, "no cause")
check("no rows for two", np.zeros((3, 3, 16, 16)), 2, "one row for each")
check("NaN", np.full((3, 16, 16), np.nan), 2, "NaN")
