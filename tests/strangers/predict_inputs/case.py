"""What people hand to `predict` of a model made from 8-bit photographs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from edgewright import edge_runtime
from edgewright.edge_runtime import cli
from edgewright.edge_runtime.errors import InputError
from edgewright.pipeline import load_recipe, run


def tell(right: bool, name: str, seen: str) -> None:
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())[-300:]}", flush=True)


def predict(file: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(["predict", BUNDLE, file])
    return code, out.getvalue()


rng = np.random.default_rng(2)
for label in ("a", "b"):
    Path("photos", label).mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(f"photos/{label}/{i}.png")
with contextlib.redirect_stdout(io.StringIO()):
    run(load_recipe("recipe.yaml"), out="out")
BUNDLE = "out/bundle"

photo = rng.integers(0, 256, (24, 20, 3), np.uint8)
np.save("upright.npy", photo)
upright = predict("upright.npy")
tags = Image.Exif()
tags[0x0112] = 6
Image.fromarray(np.ascontiguousarray(np.rot90(photo))).save("turned.png", exif=tags)
turned = predict("turned.png")
tell(turned == upright and turned[0] == 0, "a turned photograph", f"{turned[1]} as {upright[1]}")
Image.fromarray(np.dstack([photo, np.zeros((24, 20), np.uint8)])).save("clear.png")
tell(predict("clear.png") == upright, "a transparent one", predict("clear.png")[1])

Image.new("1", (20000, 20000)).save("bomb.png")
Image.fromarray(np.full((24, 20), 30000, np.uint16)).save("sixteen.png")
Image.fromarray(np.full((24, 20), 0.5, np.float32)).save("float.tif")
Path("cut.png").write_bytes(Path("turned.png").read_bytes()[:900])
np.save("sixteen.npy", np.full((24, 20, 3), 30000, np.uint16))
for name in ("bomb.png", "sixteen.png", "float.tif", "cut.png"):
    code, text = predict(name)
    tell(code == 2 and name in text, name, f"exit {code} {text}")
code, text = predict("sixteen.npy")
tell(code == 2 and "uint16" in text and "astype" not in text, "an array of 16 bits", f"exit {code} {text}")

lists = {
    "ragged rows": [[1.0, 2.0], [3.0]],
    "ragged images": [np.zeros((3, 16, 16)), np.zeros((3, 16, 15))],
    "rows of two depths": [[1.0], 2.0],
    "texts": ["photo.png"],
    "None": None,
    "numbers beyond all bits": [[10**400]],
}
with edge_runtime.load(BUNDLE) as runner:
    name = runner.inputs[0].name
    for what, value in lists.items():
        for way, call in (("predict", runner.predict), ("run", lambda x: runner.run({name: x}))):
            try:
                seen = f"{call(value)}"
                right = False
            except InputError as error:
                right, seen = name in str(error), str(error)
            except Exception as error:
                right, seen = False, f"{type(error).__name__}: {error}"
            tell(right, f"{what} to {way}", seen)
