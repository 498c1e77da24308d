"""Networks on volumes: Conv3d, grouped, depthwise and transposed, are pruned as others are."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import nn

from edgewright.export import ExportOptions, export_bundle
from edgewright.pipeline import ImageClassification
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit
from edgewright.pipeline.store.context import FolderContext

labels = torch.arange(96) % 3
volumes = torch.randn(96, 2, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1, 1) / 2
task = ImageClassification.from_arrays(volumes, labels, ["a", "b", "c"])


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv3d(16, 16, 3, 1, 1, groups=16), nn.Conv3d(16, 16, 1)

    def forward(self, x):
        return x * self.other(x.mean((2, 3, 4), keepdim=True)).sigmoid() + self.one(x)


KINDS = {
    "plain": lambda: nn.Conv3d(16, 16, 3, 1, 1, bias=False),
    "depthwise_and_gate": Joined,
    "grouped": lambda: nn.Conv3d(16, 16, 3, 1, 1, groups=4),
    "transposed": lambda: nn.ConvTranspose3d(16, 16, 2, 2),
}
for name, middle in KINDS.items():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 16, 3, 2, 1, bias=False), nn.BatchNorm3d(16), nn.ReLU(), middle(), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 12, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 3),
    ).eval()  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            config = ClassAwarePruningConfig(
                criterion="l1", target_mac_reduction=0.4, retrain={"epochs": 0}, max_drop=1.0
            )
            result = fit(model, task, config, FolderContext(Path(name), seed=0))
            # one export tells of all: it takes most of the time
            if name == "depthwise_and_gate":
                export_bundle(
                    result.model, task, Path(f"{name}.bundle"), ExportOptions(batch="single", simplify="none")
                )
        less = result.metrics["macs"] / result.metrics["macs_before"]
        print("right" if less < 0.75 else "wrong", f"{name}: {less:.2f} of the MACs", flush=True)
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
