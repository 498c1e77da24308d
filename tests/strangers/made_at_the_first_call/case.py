"""Tables that a network makes at its first call: a recipe runs, and a direct export leaves the module as it was."""

import json
import sys
import warnings
from pathlib import Path

import torch
from networks import NETWORKS, Decides, task

from edgewright.export import ExportOptions, export_bundle
from edgewright.pipeline import run
from edgewright.pipeline.recipe.recipe import parse_recipe

warnings.filterwarnings("ignore")


def said(name, right, what):
    print("right" if right else "wrong", f"{name}: {what}", flush=True)


def snapshot(model):
    return {
        (path, key): repr(value) if isinstance(value, (int, str, torch.Tensor)) else id(value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    }


def ran(name):
    data = {
        "model": f"python:networks.py:{name}",
        "task": "python:networks.py:task",
        "stages": [{"name": "train", "epochs": 1}],
        "export": {"simplify": "none"},
        "benchmark": {"enabled": False},
        "threads": 1,
    }
    try:
        result = run(parse_recipe(data, Path.cwd()), f"out-{name}")
        parity = json.loads((result.bundle / "manifest.json").read_text())["parity"]
        said(f"run_{name}", True, f"exported, parity over {parity.get('rows')} rows")
    except Exception as error:
        said(f"run_{name}", False, f"{type(error).__name__}: {str(error)[:150]}")


def exported(network):
    name = network.__name__
    model = network().train()
    model.conv.weight.requires_grad_(False) if "weight" in model.conv._parameters else None
    before = snapshot(model)
    try:
        export_bundle(model, task(), f"bundle-{name}", ExportOptions(simplify="none"))
        what = "exported"
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:100]}"
    wanted = "ExportError" if network is Decides else "exported"
    changed = [key for key in before.keys() | snapshot(model).keys() if before.get(key) != snapshot(model).get(key)]
    model(task().splits["test"].batch([0]).inputs[0])
    said(f"export_{name}", what.startswith(wanted) and not changed, f"{what[:80]}, changed {changed or 'nothing'}")


sys.path.insert(0, str(Path.cwd()))
for each in (*NETWORKS, Decides):
    exported(each)
for each in NETWORKS:
    if each.__name__ in ("Grid", "Mask", "Normed"):
        ran(each.__name__)
