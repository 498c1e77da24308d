"""Where exits go: `auto: k` against `at_macs` with evenly spread shares, on the same network with the same heads.

Per task and seed one network is trained and left alone (as `exit_policies.py` has it); heads are trained at every place
that either way may take. The thresholds are then searched as the stage does for its point `balanced`: the least mean
cost whose validation accuracy is within half a point of the network's own. The test split is read once, at the end.

`TASK.WAY.EXITS.validation_cost` and `.test_cost` are means over the seeds of the mean MACs of a row in units of the
network without exits, `.accuracy` is test accuracy minus the network's own; `TASK.saved.EXITS.validation_cost` and
`.test_cost` are what `auto` costs less, paired. All with the 95 % interval of the mean.

    python benchmarks/exit_places.py --keep FOLDER   both tasks, three seeds; trained networks are kept
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import ExitPolicy, policy_named
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.analysis import cost
from edgewright.pipeline.stages.early_exit.automatic_places import boundaries, choose_subset
from edgewright.pipeline.stages.early_exit.placement import choose_places
from edgewright.pipeline.stages.early_exit.stage import collect_logits
from edgewright.pipeline.stages.early_exit.thresholds.limits import ExitSearchConfig
from edgewright.pipeline.stages.early_exit.thresholds.search import ThresholdSearch, default_limits
from edgewright.pipeline.stages.early_exit.thresholds.trials import ExitEvaluator
from edgewright.pipeline.stages.early_exit.training import ExitTrainingConfig, train_heads
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Task
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.training.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, mean_of, report

TASKS: Mapping[str, tuple[dict[str, Any], int]] = {
    "digits": ({"size": 16}, 20),
    # without the fonts of this machine, so that every machine measures on the same images
    "glyphs": ({"size": 16, "system_fonts": False, "augment": False, "rows": {
        "train": 100, "calibration": 10, "validation": 20, "test": 100}}, 12),
}  # fmt: skip
"""Arguments of the task, and epochs of the network."""
EXITS = (1, 2, 3)
POLICY = "class_exclusion_softmax"


@dataclass(frozen=True)
class Heads:
    """Trained heads at M places of one network.

    Attributes:
        paths: of the places, in order of depth.
        logits: per split M + 1 tensors float [N, C], the network's own end last.
        targets: per split int64 [N].
        macs: M + 1 numbers, of the network alone.
        head_macs: M numbers.
        free: indices of the places between which `auto` chooses.
        spread: indices of the places of `at_macs`, per number of exits.
    """

    paths: list[str]
    logits: dict[str, list[Tensor]]
    targets: dict[str, Tensor]
    macs: list[int]
    head_macs: list[int]
    free: list[int]
    spread: dict[int, list[int]]

    def evaluator(self, split: str, chosen: Sequence[int], policy: ExitPolicy) -> ExitEvaluator:
        """Of one split with exits at some of the places."""
        passed = np.cumsum([self.head_macs[i] for i in chosen]).tolist()
        macs = [self.macs[i] + heads for i, heads in zip(chosen, passed, strict=True)] + [self.macs[-1] + passed[-1]]
        return ExitEvaluator(policy, [self.logits[split][i] for i in [*chosen, -1]], self.targets[split], macs)


def trained(name: str, seed: int, task: Task, folder: Path, quick: bool) -> nn.Module:
    """The network without exits, from `folder` where it is."""
    torch.manual_seed(seed)
    model = build("zoo:resnet_small", {"classes": len(task.labels)}, Path.cwd())
    tensors = folder / f"{name}.{seed}.network.safetensors"
    if not tensors.exists():
        training = TrainingConfig(epochs=2 if quick else TASKS[name][1], batch_size=64, learning_rate=0.1)
        with tempfile.TemporaryDirectory() as scratch:
            train_model(model, task, training, FolderContext(Path(scratch), seed), "train")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tensors)
    model.load_state_dict(load_file(tensors))
    return model.eval()


def heads_of(name: str, seed: int, folder: Path, quick: bool) -> Heads:
    """Trains heads at all places at once; they do not influence each other."""
    task = build_task(name, {**TASKS[name][0], "seed": seed}, Path.cwd())
    model = trained(name, seed, task, folder, quick)
    inputs = task.splits["validation"].batch(range(16)).inputs
    free = boundaries(model, inputs)
    spread = {k: choose_places(model, inputs, (), [(i + 1) / (k + 1) for i in range(k)]) for k in EXITS}
    places = {place.path: place for place in [*free, *(p for some in spread.values() for p in some)]}
    ordered = sorted(places.values(), key=lambda place: (place.macs, place.order))
    network = MultiExit(model, [p.head() for p in ordered], [len(p.shape) for p in ordered], len(task.labels), POLICY)
    config = ExitTrainingConfig(freeze_backbone=True, head_epochs=2 if quick else 20)
    with tempfile.TemporaryDirectory() as scratch:
        train_heads(network.eval(), task, config, FolderContext(Path(scratch), seed), augment=False)
    paths = [place.path for place in ordered]
    return Heads(
        paths,
        {split: collect_logits(network, task.splits[split]) for split in ("validation", "test")},  # type: ignore[index]
        {split: task.splits[split].targets for split in ("validation", "test")},  # type: ignore[index]
        [*(place.macs for place in ordered), cost.count(model, inputs).macs],
        [network.head(i).macs for i in range(len(ordered))],
        sorted(paths.index(place.path) for place in free),
        {k: [paths.index(place.path) for place in some] for k, some in spread.items()},
    )


def one_seed(heads: Heads, seed: int) -> dict[str, float]:
    """Both ways, for every number of exits: all thresholds on validation first, then the test split."""
    policy, config = policy_named(POLICY), ExitSearchConfig()
    found: dict[tuple[str, int], tuple[list[int], float, list[float]]] = {}
    for k in EXITS:
        placed = choose_subset(
            policy, [heads.logits["validation"][i] for i in [*heads.free, -1]], heads.targets["validation"],
            [heads.macs[i] for i in [*heads.free, -1]], [heads.head_macs[i] for i in heads.free], k,
            lambda evaluator: default_limits(evaluator, config),
        )  # fmt: skip
        for way, chosen in (("auto", [heads.free[i] for i in placed.chosen]), ("at_macs", heads.spread[k])):
            everything = heads.evaluator("validation", chosen, policy)
            search = ThresholdSearch(everything, config.restarts, torch.Generator().manual_seed(seed))
            limits = default_limits(everything, config)
            best = search.run(limits, search.published(limits).values())
            found[way, k] = chosen, float(best.mean_macs[0]) / heads.macs[-1], best.thresholds[0].tolist()
            print(f"  {way} {k}: {', '.join(heads.paths[i] for i in chosen)}, {found[way, k][1]:.4f}", flush=True)
    figures: dict[str, float] = {}
    own = float((heads.logits["test"][-1].argmax(dim=1) == heads.targets["test"]).double().mean())
    for (way, k), (chosen, value, thresholds) in found.items():
        result = heads.evaluator("test", chosen, policy).evaluate(thresholds)
        figures[f"{way}.{k}.validation_cost"] = value
        figures[f"{way}.{k}.test_cost"] = float(result.mean_macs[0]) / heads.macs[-1]
        figures[f"{way}.{k}.accuracy"] = float(result.accuracy[0]) - own
    for k in EXITS:
        for what in ("validation_cost", "test_cost"):
            figures[f"saved.{k}.{what}"] = figures[f"at_macs.{k}.{what}"] - figures[f"auto.{k}.{what}"]
    return figures


def main() -> None:
    """Measures both tasks; with --quick one seed of digits, trained briefly."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for trained networks")

    options = arguments(__doc__ or "", more)
    torch.set_num_threads(options.threads)
    seeds, tasks = ([0], ["digits"]) if options.quick else (options.seeds, options.tasks)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            runs = []
            for seed in seeds:
                print(f"{task}, seed {seed}", flush=True)
                runs.append(one_seed(heads_of(task, seed, folder, options.quick), seed))
            for name in runs[0]:
                figures[f"{task}.{name}"] = mean_of([run[name] for run in runs])
    report("exit_places", figures, options.json)


if __name__ == "__main__":
    main()
