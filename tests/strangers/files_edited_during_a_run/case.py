"""A file is edited while a training runs, by the training itself: stopped by name, and nothing of the edit is kept."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from edgewright.pipeline import run
from edgewright.pipeline.errors import EdgewrightError
from edgewright.pipeline.recipe.recipe import parse_recipe

warnings.filterwarnings("ignore")
HERE = Path.cwd()
PICTURE = "photos/a/3.png"


def pictures():
    numbers = np.random.default_rng(0)
    for label in ("a", "b"):
        Path("photos", label).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(numbers.integers(0, 255, (8, 8, 3), np.uint8)).save(f"photos/{label}/{i}.png")


def weights():
    sys.path.insert(0, str(HERE))
    from net import net

    torch.manual_seed(1)
    save_file(net().state_dict(), "weights.safetensors")


def recipe(task="python:net.py:task"):
    return parse_recipe(
        {
            "model": {"name": "python:net.py:net", "weights": "weights.safetensors"},
            "task": task,
            "stages": [{"name": "train", "epochs": 3, "batch_size": 16}],
            "export": {"simplify": "none"},
            "benchmark": {"enabled": False},
            "threads": 1,
        },
        HERE,
    )


def tried(name, given, edits):
    before = {path: Path(path).read_bytes() for path in edits}
    Path("edit.json").write_text(json.dumps({path: text.hex() for path, text in edits.items()}))
    out = Path(f"out-{name}")
    try:
        run(given, out)
        code, said = 0, "went through"
    except EdgewrightError as error:
        code, said = error.exit_code, str(error)
    stored = sorted(path.name for path in (out / "checkpoints").glob("01-*"))
    named = all(Path(path).name in said for path in list(edits)[:1])
    right = code == 2 and named and not stored and not (out / "bundle").exists()
    print("right" if right else "wrong", f"{name}: exit code {code}, stored {stored or 'nothing'}: {said[:150]}")
    Path("edit.json").unlink()
    for path, text in before.items():
        Path(path).write_bytes(text)
    return out


def again(name, given, out):
    """After the edit was taken back the result is that of the file as it is."""
    run(given, out)
    ops = {node["op"] for node in json.loads((out / "bundle/manifest.json").read_text())["nodes"]}
    print("right" if "Relu" in ops and "Tanh" not in ops else "wrong", f"{name}_taken_back: {sorted(ops)}")


def main():
    pictures()
    weights()
    other = Path("parts/__init__.py").read_bytes().replace(b"ReLU", b"Tanh")
    image = {"name": "image_folder", "args": {"path": "photos", "size": 8, "memory_mb": 0}}
    out = tried("init_of_a_package", recipe(), {"parts/__init__.py": other})
    again("init_of_a_package", recipe(), out)
    for name, path, change in (
        ("the_file_itself", "net.py", lambda text: text.replace(b"32, 2", b"32, 2, True")),
        ("a_file_that_it_imports", "parts/block.py", lambda text: text.replace(b"ACTIVATION()", b"nn.Tanh()")),
        ("the_weights", "weights.safetensors", lambda text: text[:-4] + b"\0\0\0\0"),
    ):
        tried(name, recipe(), {path: change(Path(path).read_bytes())})
    tried("a_picture", recipe(image), {PICTURE: Path("photos/b/7.png").read_bytes()})


main()
