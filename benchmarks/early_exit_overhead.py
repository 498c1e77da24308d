"""What exits cost a row that takes none of them: the deepest path against the same network without exits.

Both files are measured in one process, in interleaved blocks of random order. The first figure is the ratio for a
network large enough that a ratio means something, the second the absolute price per exit on a small one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.edge_runtime import Contender, interleaved
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.stages.early_exit.placement import choose_places
from edgewright.pipeline.tasks.image_classification import ImageClassification

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, median_of, report

CLASSES = 10
EXITS = 3


def with_exits(model: nn.Module, example: torch.Tensor) -> MultiExit:
    """Three heads where the early_exit stage puts them: near a quarter, a half and three quarters of the MACs."""
    places = choose_places(model, (example,), (), [(i + 1) / (EXITS + 1) for i in range(EXITS)])
    dims = [len(place.shape) for place in places]
    return MultiExit(model, [place.head(1) for place in places], dims, CLASSES, "class_exclusion").eval()


def measure(model: nn.Module, channels: int, quick: bool, threads: int) -> tuple[Figure, Figure]:
    """Ratio of the medians, and microseconds per exit, each with its 95 % interval."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, channels, 32, 32, generator=generator)
    task = ImageClassification({"test": (images, torch.arange(32) % CLASSES)}, [str(i) for i in range(CLASSES)])
    with tempfile.TemporaryDirectory() as folder:
        plain, exits = Path(folder, "plain"), Path(folder, "exits")
        export_bundle(model, task, plain, ExportOptions(batch="single"))
        multi = with_exits(model, images[:1])
        export_bundle(multi, task, exits)
        measured = interleaved(
            {"plain": plain, "exits": Contender(exits, thresholds=[multi.policy.never] * EXITS)},
            threads=threads,
            blocks=15 if quick else 60,
        )
    print(measured.text())
    ratio = measured.ratios["exits"]
    per_block = {name: np.median(ns, axis=1) / 1e3 for name, ns in measured.samples_ns.items()}
    price = (per_block["exits"] - per_block["plain"]) / EXITS
    return Figure(ratio.value, ratio.low, ratio.high), median_of(price)


def main() -> None:
    """Measures both networks."""
    options = arguments(__doc__ or "")
    root = Path.cwd()
    torch.manual_seed(0)
    figures = {}
    figures["deepest_path_ratio"], _ = measure(build("zoo:vgg16", {}, root), 3, options.quick, options.threads)
    _, figures["overhead_us_per_exit"] = measure(build("zoo:resnet_small", {}, root), 1, options.quick, options.threads)
    report("early_exit_overhead", figures, options.json)


if __name__ == "__main__":
    main()
