"""Recipes of tasks without classes: trained, pruned and answered as numbers; what needs classes is refused first."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import problem
import torch
import yaml

from edgewright import edge_runtime
from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.pipeline import FolderContext, load_recipe, run
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
LANGUAGE = {
    "name": "causal_lm",
    "args": {"window": 32, "tokenizer": "bytes", "most": {"train": 24, "calibration": 8, "validation": 8, "test": 8}},
}
SHORT = {"epochs": 1, "learning_rate": 0.01}
PRUNE = {"name": "class_aware_pruning", "target_mac_reduction": 0.2, "max_drop": 1.0, "retrain": SHORT}


def tell(right, name, seen):
    print("right" if right else "wrong", f"{name}: {' '.join(str(seen).split())[:300]}", flush=True)


def made(name, task, stages, model):
    Path(f"{name}.yaml").write_text(
        yaml.safe_dump({"model": model, "task": task, "stages": stages, "benchmark": {"enabled": False}, "threads": 1})
    )
    return run(load_recipe(Path(f"{name}.yaml")), Path(name))


def works(name, task, stages, model, decides=False):
    try:
        result = made(name, task, stages, model)
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
        return None
    macs = [step.macs for step in result.steps]
    pruned = not any(stage["name"] == PRUNE["name"] for stage in stages) or macs[-1] < macs[0]
    parity = edge_runtime.open_bundle(result.bundle).manifest.parity
    agrees = parity.label_agreement == 1.0 if decides else parity.label_agreement is None
    tell(pruned and agrees, name, f"MACs {macs}, equal labels {parity.label_agreement}")
    return result


def refused(name, task, stages, words, model):
    try:
        made(name, task, stages, model)
    except EdgewrightError as error:
        computed = list(Path(name).glob("checkpoints/*"))
        right = error.exit_code == 2 and not computed and all(word in str(error) for word in words)
        tell(right, name, f"{type(error).__name__}, {len(computed)} steps computed: {error}")
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
    else:
        tell(False, name, "ran")


def answered(name, result):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(9)).numpy()
    np.save("x.npy", x)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["predict", str(result.bundle), "x.npy", "--json", "said.json"])
        verified = main(["verify", str(result.bundle)])
    with edge_runtime.load(result.bundle) as runner:
        graph, answer = runner.run_rows({"x": x})["logits"], runner.predict(x)
    said = out.getvalue()
    numbers = np.ravel(json.loads(Path("said.json").read_text())["values"])
    right = code == verified == 0 and np.allclose(numbers, np.ravel(graph), atol=1e-6)
    right &= isinstance(answer, edge_runtime.Values) and np.array_equal(answer.values, graph) and not answer.labels
    tell(right and not any(w in said for w in ("score", "labels 1", "probab")), name, said)


def pruned(name, task, **changes):
    config = ClassAwarePruningConfig(**{key: value for key, value in {**PRUNE, **changes}.items() if key != "name"})
    try:
        result = fit(problem.network(), task, config, FolderContext(Path(f"state-{name}")))
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
    else:
        metrics = result.metrics
        tell(
            metrics["mac_reduction"] > 0.19, name, f"{metrics['criterion']}, {metrics['mac_reduction']:.2f} of the MACs"
        )


net = {"name": "python:problem.py:network"}
single = {**net, "args": {"outputs": 1, "flat": True}}
words = {"name": "python:problem.py:Language"}
train = {"name": "train", "epochs": 2, "optimizer": "adamw"}
task = {kind: f"python:problem.py:{kind}" for kind in ("forecast", "vectors", "one_number")}
made_of = {
    "forecast": works("forecast-train", task["forecast"], [train], net),
    "one_number": works("one_number-train", task["one_number"], [train], single),
}
works("language-train-and-l1", LANGUAGE, [train, {**PRUNE, "criterion": "l1"}], words, decides=True)  # tokens
for criterion in ("l1", "l2", "fpgm", "bn_scale", "taylor"):
    pruned(f"forecast-{criterion}", problem.forecast(), criterion=criterion)
pruned("vectors-default", problem.vectors())
for name, result in made_of.items():
    if result is None:
        tell(False, f"predict-{name}", "was not made")
    else:
        answered(f"predict-{name}", result)
for criterion in ("class_count", "class_coverage_fpgm"):
    stage = {**PRUNE, "criterion": criterion}
    refused(f"refused-{criterion}", task["forecast"], [train, stage], ("no classes", "taylor"), net)
refused("refused-early_exit", LANGUAGE, [train, {"name": "early_exit"}], ("no classes",), words)
refused("refused-smoothing", task["forecast"], [{**train, "label_smoothing": 0.1}], ("label_smoothing",), net)
refused("refused-worst", task["vectors"], [{**PRUNE, "max_worst_class_drop": 0.1}], ("max_worst_class_drop",), net)
