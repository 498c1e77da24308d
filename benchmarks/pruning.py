"""Criteria against each other: the same trained network, MAC targets, fine-tuning and surgery for all, several seeds.

A seed draws the data and its splits, the dense network and every choice of the pruning. Per criterion and target (2x,
4x, 8x fewer MACs): mean over the seeds, with its 95 % interval, of test accuracy and of the worst class' accuracy;
parameters; bytes of the exported file and the median latency as a ratio to the dense network's, measured interleaved,
once for networks of the same MACs and parameters; then the same accuracies minus those of the default criterion on the
same seed, which is what tells criteria apart.
`CRITERION.TARGET.accuracy` and `CRITERION.TARGET.worst_class` go into the JSON.

    python benchmarks/pruning.py                        glyphs (62 classes), out of the box
    python benchmarks/pruning.py --task digits
    python benchmarks/pruning.py --model zoo:resnet_small --model-args "{width_factor: 0.5}" --targets 4
    python benchmarks/pruning.py --task cifar --path cifar-10-batches-bin --model zoo:resnet56 --epochs 60
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from edgewright.edge_runtime import interleaved
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.registry import build
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.stages.class_aware_pruning import CRITERIA, ClassAwarePruningConfig, fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import SplitName, Task
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.training.evaluation import evaluate
from edgewright.pipeline.training.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import mean_of, report

TARGETS = (2.0, 4.0, 8.0)
SEEDS = (20, 21, 22)
"""No criterion was chosen with these: experiments used 0 to 2 and those from 100."""
TASKS: Mapping[str, dict[str, Any]] = {
    # without the fonts of this machine, so that every machine measures on the same images
    "glyphs": {"size": 16, "system_fonts": False, "augment": False, "rows": {
        "train": 100, "calibration": 10, "validation": 20, "test": 100}},
    "digits": {"size": 16},
    "cifar": {},
}  # fmt: skip


class Plain(nn.Module):
    """Five convolutions with batch norm: every filter can go, nothing is coupled."""

    def __init__(self, classes: int, channels: int, widths: tuple[int, ...] = (16, 24, 32, 48, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index in (0, 2) else []
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W] -> [N, classes]``."""
        logits: torch.Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Result:
    """One pruned network."""

    accuracy: float
    worst_class: float
    macs: int
    parameters: int
    bytes: int
    latency_ratio: float


def options_of(description: str) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look in under a minute, not a claim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator")
    parser.add_argument("--task", choices=sorted(TASKS), default="glyphs")
    parser.add_argument("--path", type=Path, help="folder of the data, for cifar")
    parser.add_argument("--model", default="plain", help="plain, or a name as in recipes (zoo:resnet56)")
    parser.add_argument("--model-args", type=yaml.safe_load, default={}, metavar="YAML", help="its keyword arguments")
    parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA), default=sorted(CRITERIA))
    parser.add_argument("--allocation", choices=("equal_share", "loss_per_mac"), default="equal_share")
    parser.add_argument("--round-to", choices=("cpu", "tensorrt"), help="widths as this device likes them")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="how many times fewer MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: for experiments")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append every result here; what it has is not redone")
    parser.add_argument("--epochs", type=int, default=14, help="of the dense network")
    parser.add_argument("--retrain", type=int, default=1, help="epochs after each of three pruning steps")
    parser.add_argument("--finetune", type=int, default=2, help="epochs at the end")
    options = parser.parse_args()
    if options.quick:
        options.task, options.model, options.seeds, options.epochs = "digits", "plain", [0], 3
        options.criteria, options.targets = ["class_coverage_fpgm", "l1", "random"], [4.0]
    if options.task == "cifar" and options.path is None:
        parser.error("--task cifar needs --path, the folder with the binary files")
    return options


def dense(task: Task, options: argparse.Namespace, seed: int, folder: Path) -> nn.Module:
    """The network that all criteria start from."""
    torch.manual_seed(seed)
    x = task.splits["train"].batch([0]).inputs[0]
    classes = len(task.labels)
    model = (
        Plain(classes, x.shape[1])
        if options.model == "plain"
        else build(options.model, {"classes": classes, "in_channels": x.shape[1], **options.model_args}, Path.cwd())
    )
    training = TrainingConfig(epochs=options.epochs, batch_size=64, learning_rate=0.1, warmup=0.1)
    train_model(model, task, training, FolderContext(folder, seed), "dense")
    return model


def pruned(
    model: nn.Module, task: Task, criterion: str, target: float, options: argparse.Namespace, seed: int, folder: Path
) -> nn.Module:
    """Three steps of equal ratio, each with the same retraining, then the same fine-tuning."""
    config = ClassAwarePruningConfig(
        criterion=criterion,
        target_mac_reduction=1.0 - 1.0 / target,
        target_steps=3,
        allocation=options.allocation,
        round_to=options.round_to,
        lambda1=0.0,
        lambda_o=0.0,
        retrain=TrainingConfig(epochs=options.retrain, batch_size=64, learning_rate=0.05),
        finetune=TrainingConfig(epochs=options.finetune, batch_size=64, learning_rate=0.05),
        max_drop=1.0,
    )
    result = fit(copy.deepcopy(model), task, config, FolderContext(folder, seed))
    if result.metrics["stopped"] != "target reached":
        raise SystemExit(f"{criterion} stopped before {target}x: {result.metrics['stopped']}")
    return result.model


class Exports:
    """Bytes and latency of exported networks, against the dense one."""

    def __init__(self, dense: nn.Module, task: Task, options: argparse.Namespace, folder: Path) -> None:
        self.dense, self.task, self.options, self.folder = dense, task, options, folder

    def measure(self, model: nn.Module) -> tuple[int, float]:
        """Bytes of the exported file, and its median latency over that of the dense network's."""
        plain, bundle = self.folder / "plain", self.folder / "pruned"
        if not plain.exists():
            export_bundle(self.dense, self.task, plain, ExportOptions(batch="single"))
        shutil.rmtree(bundle, ignore_errors=True)
        export_bundle(model, self.task, bundle, ExportOptions(batch="single"))
        timed = interleaved(
            {"dense": plain, "pruned": bundle},
            threads=self.options.threads,
            blocks=4 if self.options.quick else 15,
            warmup_seconds=1,
        )
        return sum(file.stat().st_size for file in bundle.glob("model.onnx*")), timed.ratios["pruned"].value


def measured(model: nn.Module, task: Task, split: SplitName, rows: Rows, exports: Exports) -> Result:
    """Quality and cost."""
    quality = evaluate(model, task, split)
    cost = count(model, task.splits["train"].batch([0]).inputs)
    alike = (r for r in rows.found.values() if (r.macs, r.parameters) == (cost.macs, cost.parameters))
    like = next(alike, None)
    size, ratio = exports.measure(model) if like is None else (like.bytes, like.latency_ratio)
    accuracy, worst = quality.accuracy or 0.0, quality.worst_class_accuracy or 0.0
    return Result(accuracy, worst, cost.macs, cost.parameters, size, ratio)


class Rows:
    """Results as they come, one line of JSON each, so that a run that was stopped goes on where it was."""

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("task", "model", "allocation", "round_to", "epochs", "retrain", "finetune", "split")
        self.protocol = {name: getattr(options, name) for name in names}
        self.protocol.update({f"model.{name}": value for name, value in options.model_args.items()})
        self.file: Path | None = options.rows
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file and self.file.exists() else []
        rows = [row for row in map(json.loads, lines) if row["protocol"] == self.protocol]
        self.found = {(row["seed"], row["target"], row["criterion"]): Result(**row["result"]) for row in rows}

    def add(self, seed: int, target: float, criterion: str, result: Result) -> None:
        """Keeps and writes one result."""
        self.found[(seed, target, criterion)] = result
        if self.file is not None:
            row = {"protocol": self.protocol, "seed": seed, "target": target, "criterion": criterion}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "result": asdict(result)}) + "\n")


def measure_seed(seed: int, options: argparse.Namespace, rows: Rows) -> None:
    """All criteria at all targets, from one dense network."""
    wanted = [(t, c) for t in options.targets for c in options.criteria if (seed, t, c) not in rows.found]
    if not wanted:
        return
    arguments = dict(TASKS[options.task], **({"path": str(options.path.resolve())} if options.path else {}))
    task = build_task(options.task, {**arguments, "seed": seed}, Path.cwd())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = dense(task, options, seed, folder / "dense")
        exports = Exports(model, task, options, folder)
        before = evaluate(model, task, options.split)
        print(f"seed {seed}: dense {shown(before.accuracy, before.worst_class_accuracy)}", flush=True)
        for target, criterion in wanted:
            place = folder / f"{criterion}-{target:g}"
            start = time.monotonic()
            small = pruned(model, task, criterion, target, options, seed, place)
            one = measured(small, task, options.split, rows, exports)
            rows.add(seed, target, criterion, one)
            took = time.monotonic() - start
            print(f"  {target:g}x {criterion:<20} {shown(one.accuracy, one.worst_class)}  ({took:.0f} s)", flush=True)


def shown(accuracy: float | None, worst: float | None) -> str:
    """Both accuracies."""
    return f"accuracy {accuracy or 0.0:.4f}  worst class {worst or 0.0:.4f}"


def table(found: Mapping[tuple[float, str], list[Result]]) -> None:
    """Mean and 95 % interval of everything, and of the difference to the default criterion."""
    default = ClassAwarePruningConfig().criterion_name
    print(f"\n{'':<26}{'accuracy':>16}{'worst class':>18}{'MACs':>12}{'parameters':>12}{'bytes':>10}{'p50 ratio':>11}")
    for (target, criterion), results in sorted(found.items()):
        means = [np.mean([getattr(r, n) for r in results]) for n in ("macs", "parameters", "bytes", "latency_ratio")]
        print(
            f"{target:>4g}x {criterion:<20}{both(results)}"
            f"{means[0]:>12,.0f}{means[1]:>12,.0f}{means[2]:>10,.0f}{means[3]:>11.3f}"
        )
    print(f"\n{f'minus {default}, same seed':<26}{'accuracy':>16}{'worst class':>18}")
    for (target, criterion), results in sorted(found.items()):
        ours = found.get((target, default), [])
        if criterion != default and ours:
            print(f"{target:>4g}x {criterion:<20}{both(results, ours)}")


def both(results: Sequence[Result], ours: Sequence[Result] = ()) -> str:
    """Mean ± half of the 95 % interval of both accuracies, minus those of `ours` where it is given."""
    text = ""
    for name in ("accuracy", "worst_class"):
        values = np.array([getattr(r, name) for r in results])
        if ours:
            values = values - np.array([getattr(r, name) for r in ours])
        figure = mean_of(values)
        text += f"{figure.value:>9.4f} ± {figure.high - figure.value:.4f}"
    return text


def main() -> None:
    """Compares, prints, writes."""
    options = options_of(__doc__ or "")
    torch.set_num_threads(options.threads)
    rows = Rows(options)
    for seed in options.seeds:
        measure_seed(seed, options, rows)
    found = {
        (target, criterion): [rows.found[(seed, target, criterion)] for seed in options.seeds]
        for target in options.targets
        for criterion in options.criteria
    }
    table(found)
    figures = {}
    for (target, criterion), results in found.items():
        figures[f"{criterion}.{target:g}x.accuracy"] = mean_of([r.accuracy for r in results])
        figures[f"{criterion}.{target:g}x.worst_class"] = mean_of([r.worst_class for r in results])
    report("pruning", figures, options.json)


if __name__ == "__main__":
    main()
