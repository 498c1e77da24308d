"""Exit policies against each other: the same trained network, the same heads, four budgets of mean MACs, several seeds.

Per task and seed one network is trained and then left alone; on its features heads are trained once per loss: binary
cross entropy of each class (both modes) and cross entropy. Every policy's thresholds are then set on the validation
split so that accuracy is best within the budget (a share of the deepest path's MACs), by the coordinate search, by the
published greedy search, or by MSDNet's geometric schedule. The test split is read once, at the end.

`TASK.POLICY.BUDGET.accuracy` and `.worst_class` are means over the seeds with one standard deviation to each side;
`.macs` is the mean cost on test, `.gain` the paired difference in accuracy to `max_probability`.

    python benchmarks/exit_policies.py --keep FOLDER   both tasks, three seeds; what is done is kept
    python benchmarks/exit_policies.py --keep FOLDER --speed --seeds 1   only how fast the thresholds are searched
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgewright.models.layers.exit_policies import policy_named
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.context import FolderContext
from edgewright.pipeline.stages.early_exit import collect_logits
from edgewright.pipeline.stages.exit_limits import Limits
from edgewright.pipeline.stages.exit_placement import choose_places, exit_macs
from edgewright.pipeline.stages.exit_search import ThresholdSearch
from edgewright.pipeline.stages.exit_training import ExitTrainingConfig, train_heads
from edgewright.pipeline.stages.exit_trials import ExitEvaluator
from edgewright.pipeline.task import Task
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, report

TASKS: Mapping[str, tuple[dict[str, Any], int]] = {
    "digits": ({"size": 16}, 20),
    # without the fonts of this machine, so that every machine measures on the same images
    "glyphs": ({"size": 16, "system_fonts": False, "augment": False, "rows": {
        "train": 100, "calibration": 10, "validation": 20, "test": 100}}, 12),
}  # fmt: skip
"""Arguments of the task, and epochs of the network."""
AT = ("stages.stage0.block0", "stages.stage0", "stages.stage1.block1", "stages.stage2.block0")
BUDGETS = (0.25, 0.4, 0.55, 0.7)
LOSSES: Mapping[str, tuple[str, str]] = {
    "pos_weight": ("class_exclusion", "pos_weight"),
    "uniform_scale": ("class_exclusion", "uniform_scale"),
    "cross_entropy": ("max_probability", "pos_weight"),
}
"""Per loss of the heads: a policy that is trained with it, and `exit_loss_mode`."""
ROWS: Mapping[str, tuple[str, str, str]] = {
    "class_exclusion": ("class_exclusion", "pos_weight", "coordinate"),
    "class_exclusion_greedy": ("class_exclusion", "pos_weight", "greedy"),
    "class_exclusion_uniform": ("class_exclusion", "uniform_scale", "coordinate"),
    "class_exclusion_uniform_greedy": ("class_exclusion", "uniform_scale", "greedy"),
    "class_exclusion_permanent": ("class_exclusion_permanent", "uniform_scale", "coordinate"),
    "max_probability_uniform": ("max_probability", "uniform_scale", "coordinate"),
    "class_exclusion_softmax": ("class_exclusion_softmax", "cross_entropy", "coordinate"),
    "class_exclusion_softmax_greedy": ("class_exclusion_softmax", "cross_entropy", "greedy"),
    "class_exclusion_softmax_geometric": ("class_exclusion_softmax", "cross_entropy", "geometric"),
    "max_probability": ("max_probability", "cross_entropy", "coordinate"),
    "max_probability_greedy": ("max_probability", "cross_entropy", "greedy"),
    "msdnet": ("max_probability", "cross_entropy", "geometric"),
    "entropy": ("entropy", "cross_entropy", "coordinate"),
    "entropy_greedy": ("entropy", "cross_entropy", "greedy"),
}
"""Per row of the table: policy, loss of the heads, search."""


def heads_of(task_name: str, seed: int, quick: bool) -> dict[str, Tensor]:
    """Trains network and heads: logits ``LOSS.SPLIT.EXIT``, targets ``SPLIT``, and the MACs of the exits, ``macs``."""
    args, epochs = TASKS[task_name]
    task = build_task(task_name, {**args, "seed": seed}, Path.cwd())
    torch.manual_seed(seed)
    model = build("zoo:resnet_small", {"classes": len(task.labels)}, Path.cwd())
    training = TrainingConfig(epochs=2 if quick else epochs, batch_size=64, learning_rate=0.1)
    with tempfile.TemporaryDirectory() as folder:
        train_model(model, task, training, FolderContext(Path(folder), seed), "train")
    example = task.splits["validation"].batch([0]).inputs
    places = choose_places(model, example, AT, ())
    found = {name: task.splits[name].targets for name in ("validation", "test")}  # type: ignore[index]
    for loss, (policy, mode) in LOSSES.items():
        dims = [len(place.shape) for place in places]
        network = MultiExit(model, [place.head(2) for place in places], dims, len(task.labels), policy).eval()
        config = ExitTrainingConfig(freeze_backbone=True, head_epochs=4 if quick else 20, exit_loss_mode=mode)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            train_heads(network, task, config, FolderContext(Path(folder), seed), augment=False)
        found["macs"] = torch.tensor(exit_macs(network, example))
        found |= _logits(network, task, loss)
    return found


def _logits(network: MultiExit, task: Task, loss: str) -> dict[str, Tensor]:
    return {
        f"{loss}.{split}.{k}": logits
        for split in ("validation", "test")
        for k, logits in enumerate(collect_logits(network, task.splits[split]))  # type: ignore[index]
    }


def evaluator(found: Mapping[str, Tensor], split: str, policy: str, loss: str) -> ExitEvaluator:
    """Of one split's cached logits."""
    logits = [found[f"{loss}.{split}.{k}"] for k in range(len(AT) + 1)]
    return ExitEvaluator(policy_named(policy), logits, found[split], found["macs"].tolist())


def one_seed(found: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """The figures of one task and seed: thresholds on validation first, all of them, then the test split."""
    chosen: dict[tuple[str, float], list[float]] = {}
    searches: dict[tuple[str, str], ThresholdSearch] = {}
    for row, (policy, loss, method) in ROWS.items():
        start = time.process_time()
        if (policy, loss) not in searches:
            generator = torch.Generator().manual_seed(seed)
            searches[policy, loss] = ThresholdSearch(evaluator(found, "validation", policy, loss), 1, generator)
        search = searches[policy, loss]
        before = sum(map(len, search.everything.log))
        for budget in BUDGETS:
            limits = Limits(budget=budget)
            published = search.published(limits)
            best = search.run(limits, published.values()) if method == "coordinate" else published[method]
            chosen[row, budget] = best.thresholds[0].tolist()
        tried, seconds = sum(map(len, search.everything.log)) - before, time.process_time() - start
        print(
            f"  {row}: {tried} settings in {seconds:.1f} s of processor time, {tried / seconds:,.0f} a second",
            flush=True,
        )
    figures: dict[str, float] = {}
    for (row, budget), thresholds in chosen.items():
        policy, loss, _ = ROWS[row]
        result = evaluator(found, "test", policy, loss).evaluate(thresholds)
        name = f"{row}.{budget}"
        figures[f"{name}.accuracy"] = float(result.accuracy[0])
        figures[f"{name}.worst_class"] = float(result.worst_class_accuracy[0])
        figures[f"{name}.macs"] = float(result.mean_cost[0])
    for row, budget in chosen:
        reference = figures[f"max_probability.{budget}.accuracy"]
        figures[f"{row}.{budget}.gain"] = figures[f"{row}.{budget}.accuracy"] - reference
    for loss in LOSSES:
        for k in range(len(AT) + 1):
            right = found[f"{loss}.test.{k}"].argmax(dim=1) == found["test"]
            figures[f"head_{loss}.{k}.accuracy"] = float(right.double().mean())
    return figures


def search_speed(found: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Settings tried in a second of processor time by the coordinate search, preparation included.

    `.packed` and `.general` are the same search of a policy that excludes, on packed sets of classes and on the path of
    the other policies; they must try and find the same.
    """
    speed: dict[str, float] = {}
    for policy, loss in (("class_exclusion", "uniform_scale"), ("max_probability", "cross_entropy")):
        logs = []
        for name in ("packed", "general") if policy_named(policy).classwise else ("general",):
            start = time.process_time()
            everything = evaluator(found, "validation", policy, loss)
            if name == "general":
                everything.packed = None
            search = ThresholdSearch(everything, 1, torch.Generator().manual_seed(seed))
            for budget in BUDGETS:
                limits = Limits(budget=budget)
                search.run(limits, search.published(limits).values())
            seconds = time.process_time() - start
            logs.append(torch.cat([trials.table() for trials in everything.log]))
            speed[f"{policy}.{name}.settings_per_s"] = len(logs[-1]) / seconds
            print(f"  {policy}, {name}: {len(logs[-1])} settings in {seconds:.2f} s (cpu)", flush=True)
        if not all(torch.equal(log, logs[0]) for log in logs):
            raise RuntimeError(f"{policy}: the packed search and the general one tried or found different settings")
    return speed


def kept_heads(folder: Path, task: str, seed: int, quick: bool) -> dict[str, Tensor]:
    """What `heads_of` gives, from `folder` where it is."""
    tensors = folder / f"{task}.{seed}.safetensors"
    if not tensors.exists():
        start = time.perf_counter()
        save_file({k: v.contiguous() for k, v in heads_of(task, seed, quick).items()}, tensors)
        print(f"{task}, seed {seed}: network and heads after {time.perf_counter() - start:.0f} s", flush=True)
    return load_file(tensors)


def kept(folder: Path, task: str, seed: int, quick: bool) -> dict[str, float]:
    """The figures of one task and seed, from `folder` where they are."""
    results = folder / f"{task}.{seed}.json"
    if not results.exists():
        results.write_text(json.dumps(one_seed(kept_heads(folder, task, seed, quick), seed), indent=1))
    found: dict[str, float] = json.loads(results.read_text())
    return found


def table(task: str, figures: Mapping[str, Figure]) -> None:
    """Accuracy, worst class and gain over `max_probability`, in per cent, one line per row of `ROWS`."""
    print(f"\n{task}: test accuracy / worst class (difference to max_probability) at {BUDGETS} of the MACs")
    for row in ROWS:
        cells = []
        for budget in BUDGETS:
            accuracy, worst, gain = (figures[f"{task}.{row}.{budget}.{x}"] for x in ("accuracy", "worst_class", "gain"))
            spread = gain.high - gain.value
            cells.append(f"{accuracy.value:6.2%} /{worst.value:5.0%} ({100 * gain.value:+.2f}±{100 * spread:.2f})")
        print(f"{row:34}" + "  ".join(cells))


def main() -> None:
    """Measures both tasks; with --quick one seed of digits, trained briefly."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for logits and interim results")
        parser.add_argument("--speed", action="store_true", help="measure the search alone")

    options = arguments(__doc__ or "", more)
    torch.set_num_threads(options.threads)
    seeds, tasks = (1, ["digits"]) if options.quick else (options.seeds, options.tasks)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            if options.speed:
                runs = [search_speed(kept_heads(folder, task, s, options.quick), s) for s in range(seeds)]
            else:
                runs = [kept(folder, task, s, options.quick) for s in range(seeds)]
            for name in runs[0]:
                values = np.array([run[name] for run in runs])
                mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
                figures[f"{task}.{name}"] = Figure(mean, mean - spread, mean + spread)
            if not options.speed:
                table(task, figures)
    report("exit_policies", figures, options.json)


if __name__ == "__main__":
    main()
