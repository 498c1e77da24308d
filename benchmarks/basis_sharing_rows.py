"""The rows of `basis_sharing.py`: each is measured in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import copy
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from basis_sharing_protocol import SavedStatistics, dense_model, perplexity, text_task
from figures import Figure, geometric_mean_of
from torch import nn

from edgewright.edge_runtime.bundle.manifest import MODEL_FILE
from edgewright.edge_runtime.language.generation import Generator
from edgewright.export.language.generator import export_generator
from edgewright.export.options import ExportOptions
from edgewright.models.sources.pretrained import LogitsOnly
from edgewright.pipeline.stage import State
from edgewright.pipeline.stages.basis_sharing.fitting import Outcome, fit_factors
from edgewright.pipeline.stages.basis_sharing.recovery import RecoveryConfig, recover
from edgewright.pipeline.stages.basis_sharing.stage import BasisSharingConfig, LayerPatterns, fit, install
from edgewright.pipeline.stages.basis_sharing.updates import updated
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.causal_lm import CausalLM

OURS: dict[str, object] = {"groups": "readers", "whitening": "two_sided", "ranks": "loss"}
METHODS: dict[str, dict[str, object]] = {
    # one basis per matrix, whitened by its input
    "svd_llm": {"groups": "matrix", "whitening": "input", "align": 1},
    # one basis per type over two layers, coefficients from the group's inputs; attention output and down alone, and
    # with grouped-query attention, which SmolLM2 has, keys and values too
    "published": {
        "groups": "layers",
        "whitening": "input",
        "share": "always",
        "refit": "group",
        "align": 1,
        "layers": LayerPatterns(private=("*k_proj", "*v_proj", "*o_proj", "*down_proj")),
    },
    "ours": OURS,
}
ABLATIONS: dict[str, dict[str, object]] = {
    "layers_refit": {**METHODS["published"], "refit": "per_layer"},
    "readers": {"groups": "readers", "whitening": "input"},
    "readers_and_layers": {"groups": "readers_and_layers", "whitening": "input"},
    "two_sided": {"groups": "readers", "whitening": "two_sided"},
    "always": {**OURS, "share": "always"},
    "two_sided_layers": {**OURS, "groups": "readers_and_layers"},
    "damped": {**OURS, "spectrum_power": 0.5},
    "low_floor": {**OURS, "rank_floor": 0.1},
    "sampled": {**OURS, "gradient_labels": "sampled"},
    "updated": {**OURS, "updates": 6},
}
RECOVERY = RecoveryConfig(steps=160, batch_size=4, learning_rate=1e-4, distillation=0.5, precision="bf16")
"""Three passes over the first half of the text."""
_WINDOW, _DECODED, _REPETITIONS = 256, 64, 9


@dataclass(frozen=True)
class Protocol:
    """What all rows have in common.

    Attributes:
        work: where statistics, factors, bundles and results are kept.
        text: a file, or None for Python's own topics.
        other: a second text, on which every model is judged as well.
        calibration: windows.
        test: windows.
        recovery: see `RecoveryConfig`.
    """

    work: Path
    text: str | None
    other: str | None
    calibration: int
    test: int
    recovery: RecoveryConfig

    @property
    def task(self) -> CausalLM:
        """Calibration and test windows."""
        return text_task(self.text, self.calibration, self.test)

    @property
    def kept(self) -> Path:
        """The folder of one text and one number of calibration windows."""
        name = "topics" if self.text is None else Path(self.text).stem
        return self.work / f"{name}.{self.calibration}"

    def judged(self, model: nn.Module) -> dict[str, Figure]:
        """Perplexity on both texts; the second without anything of it having been seen."""
        found = {"ppl": perplexity(model, self.task)}
        if self.other is not None:
            found["second_ppl"] = perplexity(model, text_task(self.other, 1, self.test))
        return found


def measured(protocol: Protocol, row: str) -> dict[str, Figure]:
    """The figures of a row, by name without the row's."""
    name, _, number = row.partition(".")
    kinds: dict[str, Callable[[], Mapping[str, Figure]]] = {
        "dense": lambda: protocol.judged(dense_model()),
        "control": lambda: _control(protocol),
        "recovered": lambda: _recovered(protocol, int(number)),
        "cost": lambda: _cost(protocol, int(number), None),
        "layers": lambda: _cost(protocol, 20, int(number)),
        "export": lambda: _exported(protocol, int(number)),
        "time": lambda: _timed(protocol, int(number)),
    }
    if name in kinds:
        return dict(kinds[name]())
    model, found = compressed(protocol, name, int(number))
    return {**found, **protocol.judged(model)}


def compressed(protocol: Protocol, name: str, ratio: int) -> tuple[nn.Module, dict[str, Figure]]:
    """The model of a method, fitted once; the statistics are shared by all that ask the same of the data."""
    config = BasisSharingConfig(ratio=ratio / 100, **{**METHODS, **ABLATIONS}[name])  # type: ignore[arg-type]
    context = FolderContext(protocol.kept / f"{name}.{ratio}")
    dense, saved = dense_model(), context.load("factorized")
    start = time.monotonic()
    if saved is None:
        outcome = fit_factors(dense, protocol.task, config, context, SavedStatistics(protocol.kept))
        if config.updates:
            before = install(copy.deepcopy(dense), outcome)
            outcome = updated(dense, before, outcome, protocol.task, config, context)
        context.save("factorized", State(outcome.data, outcome.tensors))
    else:
        outcome = Outcome(saved.data, saved.tensors)
    metrics: Mapping[str, Any] = outcome.data["metrics"]
    found = {"removed": _exact(metrics["removed_share"]), "macs_ratio": _exact(metrics["macs_ratio_merged"])}
    if saved is None:
        found["factorization_seconds"] = _exact(time.monotonic() - start)
    return install(dense, outcome), found


def _exact(value: float) -> Figure:
    return Figure(float(value), float(value), float(value))


def _first_half(protocol: Protocol) -> CausalLM:
    """All windows of the half that nothing is judged on."""
    from edgewright.pipeline.tasks.shipped.causal_lm import causal_lm

    return causal_lm(path=protocol.text, fractions={"train": 0.5, "test": 0.5}, most={"test": 1})


def _recovered(protocol: Protocol, ratio: int) -> dict[str, Figure]:
    model, _ = compressed(protocol, "ours", ratio)
    context = FolderContext(protocol.kept / f"recovered.{ratio}")
    start = time.monotonic()
    recover(model, dense_model(), _first_half(protocol), protocol.recovery, context)
    seconds, processor = time.monotonic() - start, time.process_time()
    cost = {"seconds": _exact(seconds), "processor_seconds": _exact(processor)}
    return {**cost, **protocol.judged(model)}


def _control(protocol: Protocol) -> dict[str, Figure]:
    """The dense model after the same training of the same layers."""
    model = dense_model()
    layers = [m for p, m in model.named_modules() if isinstance(m, nn.Linear) and not p.endswith("lm_head")]
    context = FolderContext(protocol.kept / "control")
    weights = [layer.weight for layer in layers]
    recover(model, dense_model(), _first_half(protocol), protocol.recovery, context, parameters=weights)
    return protocol.judged(model)


def _cost(protocol: Protocol, ratio: int, layers: int | None) -> dict[str, Figure]:
    """Calibration, gradients and factorization from the beginning, of the whole model or of its first layers."""
    model = dense_model()
    if layers is not None:
        inner = model.get_submodule("model.model")
        inner.layers = inner.get_submodule("layers")[:layers]  # type: ignore[index]
        model.get_submodule("model").config.num_hidden_layers = layers
    context = FolderContext(protocol.kept / f"cost.{ratio}.{layers}.{time.monotonic_ns()}")
    config = BasisSharingConfig(ratio=ratio / 100, **OURS)  # type: ignore[arg-type]
    start = time.monotonic()
    fit(model, protocol.task, config, context)
    seconds, processor = time.monotonic() - start, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": _exact(seconds), "processor_seconds": _exact(processor), "peak_gb": _exact(peak)}


def _exported(protocol: Protocol, ratio: int) -> dict[str, Figure]:
    """Bytes, cost and proof of the file with `ratio` percent removed; 0 is the dense model."""
    model, found = (dense_model(), {}) if ratio == 0 else compressed(protocol, "ours", ratio)
    assert isinstance(model, LogitsOnly)
    texts = protocol.task.splits["test"].batch(range(3)).inputs[0]
    made = export_generator(model, texts, protocol.kept / f"bundle.{ratio}")
    ledger, end = made.manifest.ledger, made.manifest.exits[0]
    figures = {
        **found,
        "bytes_over_predicted": _exact(made.path.stat().st_size / ledger.torch_unique_bytes),
        "file_bytes": _exact(made.path.stat().st_size),
        "max_abs_diff": _exact(made.max_abs_diff),
        "macs": _exact(end.macs),
        "attention_macs": _exact(end.attention_macs),
    }
    for weights in ("int8", "int4"):
        options = ExportOptions(weights=weights)  # type: ignore[arg-type]
        small = export_generator(model, texts, protocol.kept / f"bundle.{ratio}.{weights}", options, decode_steps=1)
        assert small.quantization is not None
        figures[f"{weights}.file_bytes"] = _exact(small.path.stat().st_size)
        figures[f"{weights}.divergence"] = _exact(small.quantization.divergence)
        figures[f"{weights}.equal_tokens"] = _exact(small.quantization.equal_tokens)
    return figures


def _timed(protocol: Protocol, ratio: int) -> dict[str, Figure]:
    """Dense against compressed, in turn: how much faster a prompt is read, and tokens are generated."""
    places = [protocol.kept / f"bundle.{number}" / MODEL_FILE for number in (0, ratio)]
    generators = [Generator(place, threads=1) for place in places]
    ids = protocol.task.splits["test"].batch([0]).inputs[0].tolist()
    ratios: dict[str, list[float]] = {"prefill_speedup": [], "all_logits_speedup": [], "decode_speedup": []}
    for _ in range(_REPETITIONS):
        taken = [_seconds(generator, ids) for generator in generators]
        for key, dense, small in zip(ratios, *taken, strict=True):
            ratios[key].append(math.log(dense / small))
    # the first repetition warms up
    return {key: geometric_mean_of(values[1:]) for key, values in ratios.items()}


def _seconds(generator: Generator, ids: list[list[int]]) -> tuple[float, float, float]:
    """Reading a prompt for its next token, reading it with logits at all its tokens, generating."""
    start = time.perf_counter()
    generator.prefill(ids)
    scored = time.perf_counter()
    logits = generator.prefill(ids, last_only=True)
    read = time.perf_counter()
    for _ in range(_DECODED):
        logits = generator.step(logits[:, -1:].argmax(axis=-1))
    return read - scored, scored - start, time.perf_counter() - read


def threads(count: int | None) -> None:
    """Of PyTorch; None leaves its choice."""
    if count is not None:
        torch.set_num_threads(count)
