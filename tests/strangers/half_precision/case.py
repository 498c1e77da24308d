"""float16 and bfloat16: models work in float32, which is said; answers and samples in half precision are refused."""

import warnings
from pathlib import Path

import torch
import yaml

from edgewright import edge_runtime
from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.pipeline import load_recipe, run

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def attempt(name, model, words=None, halved=False, **args):
    recipe = {
        "model": {"name": f"python:net.py:{model}", "args": args},
        "task": {"name": "python:net.py:task", "args": {"halved": halved}},
        "stages": [{"name": "train", "epochs": 1}],
        "benchmark": {"enabled": False},
        "threads": 1,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    try:
        result = run(load_recipe(Path("recipe.yaml")), Path(name))
    except EdgewrightError as error:
        right = words is not None and error.exit_code == 2 and all(word in str(error) for word in words)
        seen = f"{type(error).__name__}: {str(error)[:250]}"
    except Exception as error:
        right, seen = False, f"{type(error).__name__}: {error}"
    else:
        manifest = edge_runtime.open_bundle(result.bundle).manifest
        said = [note for note in result.steps[0].notes if "float32" in note]
        kinds = {spec.dtype for spec in (*manifest.inputs, *manifest.outputs)}
        right, seen = words is None and bool(said) and kinds == {"float32"}, f"{kinds}, {said}"
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())}", flush=True)


attempt("weights", "whole", dtype="float16")
for dtype in ("float16", "bfloat16"):
    attempt(f"answers-{dtype}", "Cast", (dtype, ".float()"), dtype=dtype)
attempt("some_weights", "part", dtype="bfloat16")
attempt("autocast", "Autocast", ("bfloat16", "autocast"), dtype="bfloat16")
attempt("samples", "plain", ("float16", ".float()"), halved=True)
attempt("samples_and_weights", "whole", ("float16", ".float()"), halved=True, dtype="float16")
