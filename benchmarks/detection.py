"""What pruning to half of the MACs costs a detector in mean average precision, on pages of characters.

A small network with a grid head is trained on synthetic pages, pruned to half of its MACs and trained again; beside it
the dense network is trained on for as many epochs, so that more training is not taken for good pruning. Judged on 1,000
test pages by the mean average precision over overlaps of 0.5 to 0.95, with its standard error over seeds (of pages,
network and training):

- ``dense.map``, ``pruned.map``, ``longer.map``: of the trained network, the pruned, and the one trained on;
- ``drop``, ``drop_to_longer``: what the pruned one lost against each, in the same seed;
- ``macs``: MACs of the pruned network over those of the dense one.

Resumable: finished seeds, and epochs of the one that is not, lie in ``--work``.

    python benchmarks/detection.py --work DIR [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.metric import Answer
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import SplitName, batches
from edgewright.pipeline.tasks.detection import Detection
from edgewright.pipeline.tasks.shipped.synthetic_detection import synthetic_detection
from edgewright.pipeline.training.training import TrainingConfig, train_model

sys.path.insert(0, str(Path(__file__).parent))
from figures import arguments, mean_of, report

SEEDS = (0, 1, 2)
CHARACTERS, SIZE = "AKTX", 64
ROWS: Mapping[SplitName, int] = {"train": 5000, "calibration": 120, "validation": 200, "test": 1000}
FEW: Mapping[SplitName, int] = {"train": 200, "calibration": 40, "validation": 40, "test": 100}
EPOCHS, STEPS, BETWEEN, AFTER = 9, 3, 1, 3
"""Of the dense training; how often is pruned, and how long is trained behind each time and behind all of them."""
_RATE, _RATE_AFTER, _BATCH = 3e-3, 2e-3, 32


def _conv(given: int, gives: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, gives, 3, stride, 1, bias=False), nn.BatchNorm2d(gives), nn.ReLU())


class Detector(nn.Module):
    """Pages [N, 1, H, W] to a raw grid head [N, A, 4 + C] of strides 4 and 8."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(_conv(1, 16, 2), _conv(16, 32, 2), _conv(32, 40), _conv(40, 40))
        self.coarse = nn.Sequential(_conv(40, 64, 2), _conv(64, 64), _conv(64, 64))
        self.necks = nn.ModuleList([_conv(40, 40), _conv(64, 64)])
        self.heads = nn.ModuleList([nn.Conv2d(width, 4 + classes, 1) for width in (40, 64)])
        for head in self.heads:
            assert isinstance(head, nn.Conv2d) and head.bias is not None
            nn.init.constant_(head.bias[4:], -3.0)

    def forward(self, page: Tensor) -> Tensor:
        """The raw head, the finer level first."""
        fine = self.fine(page)
        levels = zip(self.heads, self.necks, (fine, self.coarse(fine)), strict=True)
        return torch.cat([head(neck(x)).flatten(2) for head, neck, x in levels], dim=2).transpose(1, 2)


@torch.no_grad()
def judged(model: nn.Module, task: Detection, split: SplitName) -> float:
    """Mean average precision of the boxes that the device would answer."""
    model.eval()
    return task.metric.score(Answer(model(*b.inputs), b.targets) for b in batches(task.splits[split], 250)).value


def training(epochs: int, rate: float) -> TrainingConfig:
    """AdamW with a cosine."""
    return TrainingConfig(epochs=epochs, batch_size=_BATCH, optimizer="adamw", learning_rate=rate, warmup=0.1)


def one_seed(seed: int, quick: bool, split: SplitName, folder: Path) -> dict[str, float]:
    """The figures of a seed; what is finished of it is read from `folder`."""
    epochs, between, after = (4, 1, 2) if quick else (EPOCHS, BETWEEN, AFTER)
    task = synthetic_detection(seed, FEW if quick else ROWS, SIZE, CHARACTERS, most=3, metric="map")
    torch.manual_seed(seed)
    dense = Detector(len(CHARACTERS))
    train_model(dense, task, training(epochs, _RATE), FolderContext(folder / "dense", seed), "train")
    pruning = ClassAwarePruningConfig.model_validate(
        {
            "target_mac_reduction": 0.5,
            "target_steps": STEPS,
            "max_drop": 1.0,
            "retrain": training(between, _RATE_AFTER),
            "finetune": training(after, _RATE_AFTER),
        }
    )
    pruned = fit(copy.deepcopy(dense), task, pruning, FolderContext(folder / "pruned", seed)).model
    longer = copy.deepcopy(dense)
    more = training(STEPS * between + after, _RATE_AFTER)
    train_model(longer, task, more, FolderContext(folder / "longer", seed), "train")
    row = task.splits[split].batch([0]).inputs
    return {
        "dense": judged(dense, task, split),
        "pruned": judged(pruned, task, split),
        "longer": judged(longer, task, split),
        "macs": count(pruned, row).macs / count(dense, row).macs,
    }


def more_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path("build/detection"), help="finished seeds and epochs, kept")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation: for experiments")


def main() -> None:
    """Every seed; means and their intervals."""
    options = arguments(__doc__ or "", more_arguments)
    torch.set_num_threads(options.threads)
    found = []
    for seed in options.seeds[:1] if options.quick else options.seeds:
        folder = options.work / f"{'quick' if options.quick else 'whole'}-{seed}"
        place = folder / f"{options.split}.json"
        if not place.is_file():
            began = time.monotonic()
            figures = one_seed(seed, options.quick, options.split, folder)
            place.write_text(json.dumps({**figures, "seconds": time.monotonic() - began}), encoding="utf-8")
        found.append(json.loads(place.read_text(encoding="utf-8")))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in found[-1].items()), flush=True)
    columns = {name: np.array([row[name] for row in found]) for name in ("dense", "pruned", "longer", "macs")}
    values = {f"{name}.map": columns[name] for name in ("dense", "pruned", "longer")} | {
        "drop": columns["dense"] - columns["pruned"],
        "drop_to_longer": columns["longer"] - columns["pruned"],
        "macs": columns["macs"],
    }
    if len(found) > 1:
        errors = {name: value.std(ddof=1) / len(value) ** 0.5 for name, value in values.items()}
        print("standard errors: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    report("detection", {name: mean_of(value) for name, value in values.items()}, options.json)


if __name__ == "__main__":
    main()
