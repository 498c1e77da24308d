"""What class-aware scores cost: ResNet-56, 100 classes of 10 images, every convolution in one pass per class.

`seconds` and `peak_gb` are of a fresh process that scores all classes, `speedup_over_layerwise` is against one forward
and backward pass per class and layer, interleaved on a few classes, where both must find the same counts. Figures
are medians of the repetitions. `--threads` are PyTorch's here; one thread
is enough for the bound of 45 seconds.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from edgewright.models.registry import build
from edgewright.pipeline.analysis.channels.axes import is_mixing
from edgewright.pipeline.stages.class_aware_pruning.scored_samples import ScoredSamples
from edgewright.pipeline.stages.class_aware_pruning.scores import FilterStatistics, ScoringSettings, collect
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.splits import TensorSplit

sys.path.insert(0, str(Path(__file__).parent))
from figures import arguments, median_of, report

IMAGES = 10


def network(classes: int) -> tuple[nn.Module, list[str], TensorSplit]:
    """The model, its convolutions, and images of noise, the same in every process."""
    torch.manual_seed(0)
    model = build("zoo:resnet56", {"classes": classes}, Path.cwd()).eval()
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d) and is_mixing(module)]
    images = torch.randn(classes * IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    # without statistics the untrained network's logits are so large that cross entropy has no gradient left
    with torch.no_grad():
        model.train()(images[:100])
    model.eval()
    return model, layers, TensorSplit([images], torch.arange(classes * IMAGES) % classes)


def at_once(model: nn.Module, layers: list[str], split: TensorSplit, classes: int) -> dict[str, FilterStatistics]:
    """All layers together, as the stage does it."""
    with tempfile.TemporaryDirectory() as folder:
        task = ImageClassification({"calibration": split}, [str(i) for i in range(classes)])
        settings = ScoringSettings(images_per_class=IMAGES, tau_mode="absolute")
        return collect(model, layers, ScoredSamples(task, split), settings, FolderContext(Path(folder)))


def layerwise(model: nn.Module, layers: list[str], split: TensorSplit, classes: int) -> dict[str, Tensor]:
    """Class counts with a pass of its own for every layer and class."""
    found = {}
    for path in layers:
        total: Tensor | None = None
        for label in range(classes):
            kept: list[Tensor] = []
            batch = split.batch((split.targets == label).nonzero().flatten())
            handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, output, to=kept: to.append(output))
            # the sum, because a mean would only make gradients smaller
            loss = nn.functional.cross_entropy(model(*batch.inputs), batch.targets, reduction="sum")
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, kept[0])
            share = (kept[0] * gradient != 0).float().mean(dim=0).flatten(1)
            total = share if total is None else total + share
        assert total is not None
        found[path] = total.amax(dim=1)
    return found


def child(classes: int, threads: int, results: multiprocessing.queues.Queue[tuple[float, float]]) -> None:
    """Scores everything once; hands back seconds and the peak of the process' memory in GB."""
    torch.set_num_threads(threads)
    model, layers, split = network(classes)
    start = time.perf_counter()
    at_once(model, layers, split, classes)
    seconds = time.perf_counter() - start
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def whole(classes: int, threads: int, repetitions: int) -> list[tuple[float, float]]:
    """(seconds, GB) of every repetition, each in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    found = []
    for _ in range(repetitions):
        results = spawn.Queue()
        process = spawn.Process(target=child, args=(classes, threads, results))
        process.start()
        found.append(cast("tuple[float, float]", results.get()))
        process.join()
    return found


def compared(classes: int, layer_step: int, repetitions: int) -> list[float]:
    """Time of `layerwise` over time of `at_once`; counts of both must agree."""
    model, layers, split = network(classes)
    layers = layers[::layer_step]
    ratios = []
    for _ in range(repetitions):
        start = time.perf_counter()
        together = at_once(model, layers, split, classes)
        middle = time.perf_counter()
        alone = layerwise(model, layers, split, classes)
        ratios.append((time.perf_counter() - middle) / (middle - start))
        for path in layers:
            # gradients that underflow in one of the two ways would show here
            torch.testing.assert_close(together[path].class_count, alone[path], atol=0.3, rtol=0)
    return ratios


def main() -> None:
    """Measures, then compares."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(options.threads)
    measured = whole(5 if options.quick else 100, options.threads, 1 if options.quick else 3)
    ratios = compared(2, 4 if options.quick else 1, 1 if options.quick else 3)
    figures = {
        "seconds": median_of([seconds for seconds, _ in measured]),
        "peak_gb": median_of([gigabytes for _, gigabytes in measured]),
        "speedup_over_layerwise": median_of(ratios),
    }
    report("scoring", figures, options.json)


if __name__ == "__main__":
    main()
