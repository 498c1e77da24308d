"""What specialising to some classes is worth: a network of ten classes against one that knows three of them only.

Both are pruned from the same trained network with the same criterion and seed, and trained for as many steps, which is
more epochs where there are fewer samples; the three-class one goes to more than twice the MAC reduction. Several
triples of classes and several seeds (of data, network and training), on the digits and on ten of the glyphs. Per task:

- ``macs_ratio``: MACs of the ten-class network over those of the three-class one;
- ``ten``, ``three``: accuracy on the test samples of the three classes; ``ten_of_three`` is the ten-class network with
  its seven other logits ignored, which is all that could be asked of it;
- ``difference``: three minus ten on the same samples, with the 95 % interval of its mean over the pairs of networks;
  ``difference_of_three``: three minus ten_of_three.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.edge_runtime.measure.paired import paired_drop
from edgewright.models.registry import build
from edgewright.pipeline.quality_drop import drop_text
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import SplitName, Task, batches
from edgewright.pipeline.tasks.class_subset import ClassSubset
from edgewright.pipeline.tasks.shipped.digits import digits
from edgewright.pipeline.tasks.shipped.glyphs import glyphs
from edgewright.pipeline.training.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import arguments, mean_of, report

TRIPLES = ((3, 5, 8), (1, 4, 7), (0, 6, 9), (2, 5, 6))
SEEDS = (20, 21, 22)
TEN, THREE = 0.75, 0.88
"""Shares of the MACs that go: 4 times fewer for ten classes, a little more than 8 times for three."""
TASKS: Mapping[str, Callable[[int], Task]] = {
    "digits": lambda seed: digits(
        seed, size=16, fractions={"train": 0.5, "calibration": 0.05, "validation": 0.1, "test": 0.35}
    ),
    # letters that are easily taken for each other, from the fonts of matplotlib's wheel
    "glyphs": lambda seed: glyphs(
        seed,
        size=16,
        characters="BDEFHKPRSX",
        system_fonts=False,
        rows={"train": 100, "calibration": 10, "validation": 20, "test": 200},
    ),
}


def pruned(model: nn.Module, task: Task, share: float, classes: tuple[int, ...], seed: int) -> tuple[nn.Module, int]:
    """`model` after the stage, and its MACs."""
    often = len(task.labels) / len(classes) if classes else 1.0
    config = ClassAwarePruningConfig(
        target_mac_reduction=share,
        target_steps=3,
        classes=classes,
        prune_residual=True,
        max_drop=1.0,
        lambda1=1e-5,
        lambda_o=1e-3,
        retrain={"epochs": round(2 * often), "batch_size": 64, "learning_rate": 0.05},
        finetune={"epochs": round(6 * often), "batch_size": 64, "learning_rate": 0.05},
    )
    with tempfile.TemporaryDirectory() as folder:
        result = fit(copy.deepcopy(model), task, config, FolderContext(Path(folder), seed=seed))
    if result.metrics["stopped"] != "target reached":
        raise SystemExit(f"pruning stopped before its target: {result.metrics['stopped']}")
    return result.model, result.metrics["macs"]


@torch.no_grad()
def logits_of(model: nn.Module, task: Task, split: SplitName) -> torch.Tensor:
    """[rows, logits]."""
    return torch.cat([model.eval()(*batch.inputs) for batch in batches(task.splits[split], 256)])


def one_seed(task: Task, seed: int, triples: Sequence[tuple[int, ...]], split: SplitName) -> list[dict[str, float]]:
    """The figures of every triple, from one trained network."""
    torch.manual_seed(seed)
    model = build("zoo:resnet_small", {}, Path.cwd())
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(epochs=10, batch_size=64, learning_rate=0.1)
        train_model(model, task, training, FolderContext(Path(folder), seed=seed), "train")
    ten, ten_macs = pruned(model, task, TEN, (), seed)
    found = []
    for classes in triples:
        three, three_macs = pruned(model, task, THREE, classes, seed)
        subset = ClassSubset(task, classes)
        targets, wide = subset.splits[split].targets, logits_of(ten, subset, split)
        general = wide[:, list(classes)].argmax(1) == targets
        special = logits_of(three, subset, split).argmax(1) == targets
        row = {
            "ten": float((wide.argmax(1) == torch.tensor(classes)[targets]).double().mean()),
            "ten_of_three": float(general.double().mean()),
            "three": float(special.double().mean()),
            "macs_ratio": ten_macs / three_macs,
        }
        found.append(row)
        names = " ".join(task.labels[c] for c in classes)
        drop = drop_text(paired_drop(general.numpy(), special.numpy()))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        print(f"  {names}: {shown}; three against ten_of_three: drop {drop}", flush=True)
    return found


def more_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: for experiments")


def main() -> None:
    """Every task, seed and triple; means and their intervals."""
    options = arguments(__doc__ or "", more_arguments)
    torch.set_num_threads(options.threads)
    seeds, triples = (options.seeds[:1], TRIPLES[:1]) if options.quick else (options.seeds, TRIPLES)
    figures = {}
    for name in options.tasks[:1] if options.quick else options.tasks:
        found = []
        for seed in seeds:
            print(f"{name}, seed {seed}", flush=True)
            found += one_seed(TASKS[name](seed), seed, triples, options.split)
        columns = {column: np.array([row[column] for row in found]) for column in found[0]}
        columns["difference"] = columns["three"] - columns["ten"]
        columns["difference_of_three"] = columns["three"] - columns["ten_of_three"]
        figures.update({f"{name}.{column}": mean_of(values) for column, values in columns.items()})
    report("class_subset", figures, options.json)


if __name__ == "__main__":
    main()
