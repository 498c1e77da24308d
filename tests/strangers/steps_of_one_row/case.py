"""What would fail in a training step is bad input before anything is computed, with advice that works."""

import warnings
from pathlib import Path

import torch
import yaml

from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.pipeline import load_recipe, run
from edgewright.pipeline.runs.preparation import prepare

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def attempt(name, words=None, *, model="Net", rows=24, train=None, batch=8, stage="train", to_the_end=False, **args):
    training = {"epochs": 1, "batch_size": batch}
    exits = {"name": "early_exit", "at": ["features.0"], "head_epochs": 1, "training": training}
    stages = {
        "train": {"name": "train", **training},
        "retrain": {"name": "class_aware_pruning", "criterion": "l1", "retrain": training, "max_drop": 1.0},
        "exits": exits,
        "frozen": {**exits, "freeze_backbone": True},
    }
    task = {"name": "python:net.py:task", "args": {"rows": rows, "train": train}}
    recipe = {
        "model": {"name": f"python:net.py:{model}", "args": args},
        "task": task,
        "stages": [stages[stage]],
        "benchmark": {"enabled": False},
        "threads": 1,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = load_recipe(Path("recipe.yaml"))
    try:
        run(recipe, Path(name)) if to_the_end else prepare(recipe)
    except EdgewrightError as error:
        early = not list(Path(name).glob("checkpoints/*"))
        right = words is not None and error.exit_code == 2 and early and all(w in str(error) for w in words)
        seen = f"{type(error).__name__}{'' if early else ', after computing'}: {str(error)[-260:]}"
    except Exception as error:
        right, seen = False, f"{type(error).__name__}: {error}"
    else:
        right, seen = words is None, "ran"
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())}", flush=True)


attempt("batch_of_one", ("batch_size is 1", "BatchNorm2d"), norm="batch", batch=1)
attempt("one_sample", ("one sample",), norm="batch", train=1)
attempt("last_batch_of_one", norm="batch", rows=9, to_the_end=True)
attempt("batch_beyond_the_split", norm="batch", batch=100)
attempt("retrained_on_one", ("retrain.batch_size is 1",), norm="batch", batch=1, stage="retrain")
attempt("exits_on_one", ("training.batch_size is 1",), norm="batch", batch=1, stage="exits")
attempt("frozen_on_one", norm="batch", batch=1, stage="frozen")
attempt("instance_norm_of_a_pixel", ("one number is left",), norm="instance")
attempt("group_norm_of_a_number", ("one number is left",), norm="group")
attempt("group_norm", norm="groups", batch=1)
attempt("two_outputs_in_eval", ("isinstance(out, torch.Tensor) else out[1]",), back="both")
attempt("wrapper_of_eval_alone", ("in training mode", "isinstance(out, torch.Tensor)"), model="First")
attempt("wrapper_as_advised", model="Either")
attempt("two_outputs_in_training", ("in training mode",), back="auxiliary")
attempt("rows_compared", ("export.batch: single",), back="rows", to_the_end=True)
