"""What specialising to some classes is worth: the demo's network on digits, for all ten classes and for three of them.

Both are pruned from the same trained network with the same criterion and seeds, and trained for as many steps, which is
more epochs where there are fewer samples; the three-class one goes to twice the MAC reduction. ``ten.accuracy`` is the
ten-class network's on the test samples of the three classes, ``ten.best_of_three`` the same with the other seven logits
ignored, which is all that could be asked of it; ``three.accuracy`` is the specialised network's. ``macs_ratio`` is
ten-class over three-class MACs.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.models.registry import build
from edgewright.pipeline.class_subset import ClassSubset
from edgewright.pipeline.context import FolderContext
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit
from edgewright.pipeline.task import Task, batches
from edgewright.pipeline.tasks.digits import digits
from edgewright.pipeline.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, report

CLASSES = (3, 5, 8)
TEN, THREE = 0.75, 0.88
"""Shares of the MACs that go: 4 times fewer for ten classes, a little more than 8 times for three."""


def pruned(model: nn.Module, task: Task, share: float, classes: tuple[int, ...], seed: int) -> tuple[nn.Module, int]:
    """`model` after the stage, and its MACs."""
    often = len(task.labels) / len(classes) if classes else 1.0
    config = ClassAwarePruningConfig(
        criterion="class_count_fisher",
        target_mac_reduction=share,
        classes=classes,
        prune_residual=True,
        max_frac_per_iter=0.3,
        max_drop=1.0,
        lambda1=1e-5,
        lambda_o=1e-3,
        retrain={"epochs": round(2 * often), "batch_size": 64, "learning_rate": 0.05},
        finetune={"epochs": round(6 * often), "batch_size": 64, "learning_rate": 0.05},
    )
    with tempfile.TemporaryDirectory() as folder:
        result = fit(copy.deepcopy(model), task, config, FolderContext(Path(folder), seed=seed))
    print(f"  {len(classes) or 10} classes: {result.metrics['stopped']}, {result.metrics['macs']:,} MACs", flush=True)
    return result.model, result.metrics["macs"]


@torch.no_grad()
def logits_of(model: nn.Module, task: Task) -> torch.Tensor:
    """Of the test split, [rows, logits]."""
    return torch.cat([model.eval()(*batch.inputs) for batch in batches(task.splits["test"], 256)])


def one_seed(seed: int) -> dict[str, float]:
    """The figures of one seed, of data, network and training."""
    task = digits(seed=seed)
    torch.manual_seed(seed)
    model = build("zoo:resnet_small", {}, Path.cwd())
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(epochs=10, batch_size=64, learning_rate=0.1)
        train_model(model, task, training, FolderContext(Path(folder), seed=seed), "train")
    ten, ten_macs = pruned(model, task, TEN, (), seed)
    three, three_macs = pruned(model, task, THREE, CLASSES, seed)
    subset = ClassSubset(task, CLASSES)
    targets, wide = subset.splits["test"].targets, logits_of(ten, subset)
    return {
        "ten.accuracy": float((wide.argmax(1) == torch.tensor(CLASSES)[targets]).double().mean()),
        "ten.best_of_three": float((wide[:, list(CLASSES)].argmax(1) == targets).double().mean()),
        "three.accuracy": float((logits_of(three, subset).argmax(1) == targets).double().mean()),
        "macs_ratio": ten_macs / three_macs,
    }


def main() -> None:
    """Three seeds; mean, smallest and largest."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(options.threads)
    found = []
    for seed in range(1 if options.quick else 3):
        print(f"seed {seed}", flush=True)
        found.append(one_seed(seed))
        print("  " + ", ".join(f"{name} {value:.4f}" for name, value in found[-1].items()), flush=True)
    columns = {name: np.array([row[name] for row in found]) for name in found[0]}
    figures = {n: Figure(float(c.mean()), float(c.min()), float(c.max())) for n, c in columns.items()}
    report("class_subset", figures, options.json)


if __name__ == "__main__":
    main()
