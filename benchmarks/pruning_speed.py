"""What pruning to half the MACs buys after export: torchvision's architectures at 224 x 224, dense against pruned.

Every network is pruned by the stage itself (l1, equal shares, widths for the CPU, no training: speed does not depend on
values), has to compute what the masked dense network computes, is exported with parity, and is measured against the
dense one in interleaved blocks of random order. ``ARCH.speedup`` is dense over pruned latency, ``ARCH.mac_reduction``
dense over pruned MACs, ``ARCH.realised`` the first over the second: how much of the arithmetic that went was time.

``--bundles FOLDER`` keeps what was exported, and measures what it finds there without pruning again; with
``--prepare-only`` as well, nothing is timed, so that the minutes of pruning need no quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from edgewright.edge_runtime import interleaved
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.registry import build
from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.equivalence import probe
from edgewright.pipeline.analysis.opening import reopen
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import SPLITS
from edgewright.pipeline.tasks.image_classification import ImageClassification

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, report

ARCHITECTURES = (
    "vgg16", "vgg16_bn", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "mobilenet_v2",
    "mobilenet_v3_small", "efficientnet_b0", "mnasnet1_0", "densenet121", "regnet_y_400mf", "convnext_tiny",
    "squeezenet1_1", "inception_v3", "googlenet", "shufflenet_v2_x1_0", "vit_b_16", "swin_t",
)  # fmt: skip
CLASSES = 4


def random_task(rows: int = 4, size: int = 224) -> ImageClassification:
    """Noise: neither l1 nor latency looks at it."""
    generator = torch.Generator().manual_seed(1)
    splits = {
        name: (torch.randn(rows, 3, size, size, generator=generator), torch.arange(rows) % CLASSES) for name in SPLITS
    }
    return ImageClassification(splits, [str(i) for i in range(CLASSES)])


@torch.no_grad()
def network(name: str, images: torch.Tensor) -> nn.Module:
    """Random weights whose activations are neither tiny nor huge, so that differences mean something."""
    torch.manual_seed(0)
    model = probe(build(f"torchvision:{name}", {"num_classes": CLASSES}, Path.cwd()))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    if norms:
        model(images)
    for norm in norms:
        # a channel that hardly varies on four images of noise would blow rounding up to the size of signals
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))
    # logits of 50 (inception_v3) are off by 5e-4 in PyTorch's own float32, more than parity allows for
    size = max(1.0, float(model.eval()(images).abs().max()))
    classifier = [module for module in model.modules() if module._parameters.get("weight") is not None][-1]
    for value in classifier.parameters(recurse=False):
        value.div_(size)
    return model


def prune(
    model: nn.Module, task: ImageClassification, options: argparse.Namespace, folder: Path
) -> tuple[nn.Module, float]:
    """The pruned network and how many times fewer MACs it has.

    Raises:
        SystemExit: it does not compute what the masked dense network computes.
    """
    config = ClassAwarePruningConfig(
        criterion="l1",
        target_mac_reduction=0.5,
        allocation="equal_share",
        mode="threshold_only",
        round_to=options.round_to,
        prune_residual=options.prune_residual,
        max_drop=1.0,
        retrain={"epochs": 0},
    )
    dense = copy.deepcopy(model)
    result = fit(model, task, config, FolderContext(folder))
    reopen(dense, result.edit.data.get("opened", ()))
    images = task.splits["test"].batch([0, 1]).inputs[0]
    with torch.no_grad():
        expected = surgery.masked(dense, surgery.from_json(result.edit.data["keep"])).eval()(images)
        error = float((result.model(images) - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not error <= 1e-5:
        raise SystemExit(f"the pruned network is off by {error:.2g} from the masked one")
    print(f"  pruned = masked within {error:.1e} of outputs up to {float(expected.abs().max()):.2g}")
    return result.model, result.metrics["macs_before"] / result.metrics["macs"]


def prepare(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Exports one architecture dense and pruned; the file ``mac_reduction`` is written last."""
    task = random_task()
    model = network(name, task.splits["train"].batch([0, 1, 2, 3]).inputs[0])
    export_bundle(model, task, folder / "dense", ExportOptions(batch="single"))
    with tempfile.TemporaryDirectory() as state:
        pruned, fewer = prune(model, task, options, Path(state))
    parity = export_bundle(pruned, task, folder / "pruned", ExportOptions(batch="single")).manifest.parity
    print(f"  {fewer:.2f} times fewer MACs, parity {parity.max_abs_diff:.1e}", flush=True)
    (folder / "mac_reduction").write_text(f"{fewer!r}\n", encoding="utf-8")


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Figure]:
    """The three figures of one architecture."""
    fewer = float((folder / "mac_reduction").read_text(encoding="utf-8"))
    measured = interleaved(
        {"dense": folder / "dense", "pruned": folder / "pruned"},
        threads=options.threads,
        blocks=10 if options.quick else 30,
        block_runs=3 if options.quick else 5,
    )
    print(measured.text(), flush=True)
    ratio = measured.ratios["pruned"]
    speedup = Figure(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    return {
        f"{name}.speedup": speedup,
        f"{name}.mac_reduction": Figure(fewer, fewer, fewer),
        f"{name}.realised": Figure(speedup.value / fewer, speedup.low / fewer, speedup.high / fewer),
    }


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default all, with --quick resnet18")
    parser.add_argument("--round-to", default="cpu", help="as in recipes: cpu, tensorrt or a number")
    parser.add_argument("--prune-residual", action="store_true", help="also narrow residual streams")
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="keep the exported bundles here, and reuse them")
    parser.add_argument("--prepare-only", action="store_true", help="prune and export, measure nothing")


def main() -> None:
    """Measures one architecture after the other."""
    options = arguments(__doc__ or "", _options)
    options.round_to = int(options.round_to) if options.round_to.isdigit() else options.round_to
    # the exporter warns of what torchvision does in its own code
    warnings.filterwarnings("ignore", module="torch")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.arch or (("resnet18",) if options.quick else ARCHITECTURES):
            print(name, flush=True)
            folder = (options.bundles or Path(scratch)) / name
            if not (folder / "mac_reduction").exists():
                prepare(name, options, folder)
            if not options.prepare_only:
                figures.update(measure(name, options, folder))
    if figures:
        report("pruning_speed", figures, options.json)


if __name__ == "__main__":
    main()
