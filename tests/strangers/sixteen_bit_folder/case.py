"""A folder of 16-bit grey PNGs, trained on, and asked again by file and by array; and the same mixed with 8 bits."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from edgewright.edge_runtime import cli
from edgewright.pipeline import load_recipe, run
from edgewright.pipeline.errors import EdgewrightError


def tell(right: bool, name: str, seen: str) -> None:
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())[-300:]}", flush=True)


def trained(out: str) -> tuple[int, str]:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            run(load_recipe("recipe.yaml"), out=out)
    except EdgewrightError as error:
        return error.exit_code, str(error)
    return 0, ""


def predict(file: str) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.main(["predict", "out/bundle", file])
    return code, text.getvalue()


rng = np.random.default_rng(1)
for label in ("column", "row"):
    Path("scans", label).mkdir(parents=True)
    for i in range(50):
        scan = rng.integers(20000, 26000, (16, 16))
        at = int(rng.integers(2, 14))
        scan[at if label == "row" else slice(None), slice(None) if label == "row" else at] += 36000
        Image.fromarray(scan.astype(np.uint16)).save(f"scans/{label}/{i:02}.png")

code, text = trained("out")
tell(code == 0, "training", f"exit {code} {text}")
hits, same = 0, 0
for label in ("column", "row"):
    for i in range(4):
        file = f"scans/{label}/{i:02}.png"
        code, from_file = predict(file)
        np.save("scan.npy", np.asarray(Image.open(file)).astype(np.uint16)[:, :, None])
        _, from_array = predict("scan.npy")
        hits += f" {label} " in from_file
        same += code == 0 and from_file == from_array
tell(hits >= 7, "predict by file", f"{hits} of 8 right")
tell(same == 8, "file and array alike", f"{same} of 8")

np.save("wrong.npy", np.zeros((16, 16, 1), np.int64))
code, text = predict("wrong.npy")
tell(code == 2 and "uint16" in text, "an array of another dtype", f"exit {code} {text}")

Image.fromarray(np.full((16, 16), 128, np.uint8)).save("scans/row/eight.png")
code, text = trained("mixed")
tell(code == 2 and "eight.png" in text and "max_value" in text, "8 bits among 16", f"exit {code} {text}")
Path("scans/row/eight.png").unlink()
Image.fromarray(np.full((16, 16), 0.5, np.float32)).save("scans/row/float.tif")
code, text = trained("mixed")
tell(code == 2 and "float.tif" in text, "floats of no known range", f"exit {code} {text}")
