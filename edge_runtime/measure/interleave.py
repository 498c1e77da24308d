"""Comparing artefacts side by side: one process, blocks in random order, paired ratios with intervals.

Two runs one after the other compare the machine's moods as much as the artefacts. Here each block runs every
artefact on the same inputs within a moment, and only ratios within a block are compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import open_bundle
from ..bundle.manifest import MODEL_FILE
from ..errors import EdgewrightError, InputError
from ..inference.options import SessionKeywords, SessionOptions
from ..inference.providers import warn_of_fallback
from .bench_inputs import MOST_FEEDS, cut, golden_feeds, not_zero, read_inputs, user_feeds
from .benchmark import latency_figures
from .child import Artefact, block_settings, run_child
from .paired import Ratio, paired_ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack

_STATISTICS = ("median", "mean")


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        path: a bundle (folder or zip), or a bare .onnx file.
        inputs: .npz with an array per graph input, rows in axis 0, or a .npy; needed by a bare .onnx, and
            instead of the golden inputs for a bundle.
        thresholds: for its exits; None: those stored in the graph.
        operating_point: of a bundle, instead of `thresholds`.
        layout: of a bundle, see `options.Layout`.
    """

    path: str | os.PathLike[str]
    inputs: str | os.PathLike[str] | None = None
    thresholds: Sequence[float] | None = None
    operating_point: str | None = None
    layout: str = "file"


@dataclass(frozen=True)
class Interleaved:
    """Samples and ratios of an interleaved measurement.

    Attributes:
        samples_ns: name -> int64 [blocks, runs].
        exits: name -> int64 [blocks, runs], -1 for models without exits.
        ratios: name -> latency of that artefact over the baseline's, paired by block; without the baseline.
        baseline: name of the first artefact, or the one asked for.
        settled: name -> whether its warm-up settled.
        statistic: what each block is reduced to.
        settings: the options of the measurement.
        placements: name -> `Placement.to_dict` of its session.
    """

    samples_ns: Mapping[str, NDArray[np.int64]]
    exits: Mapping[str, NDArray[np.int64]]
    ratios: Mapping[str, Ratio]
    baseline: str
    settled: Mapping[str, bool]
    statistic: str
    settings: Mapping[str, Any]
    placements: Mapping[str, Mapping[str, Any]]

    def latency_ms(self, name: str) -> dict[str, Any]:
        """The figures of one artefact over all blocks, as in a row of `bench`."""
        return latency_figures(self.samples_ns[name].ravel())[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report, every sample included."""
        return {
            "schema_version": 1,
            "baseline": self.baseline,
            "statistic": self.statistic,
            "boundary": "host",
            "settings": dict(self.settings),
            "settled": dict(self.settled),
            "placements": {name: dict(placement) for name, placement in self.placements.items()},
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "latency_ms": {name: self.latency_ms(name) for name in self.samples_ns},
            "samples_ns": {name: samples.tolist() for name, samples in self.samples_ns.items()},
        }

    def text(self) -> str:
        """A table: p50 of every artefact, and its ratio to the baseline."""
        width = max(len(name) for name in self.samples_ns)
        lines = []
        for name, samples in self.samples_ns.items():
            line = f"{name:<{width}}  p50 {float(np.median(samples)) / 1e6:9.4f} ms"
            if name in self.ratios:
                ratio = self.ratios[name]
                line += f"   x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] {ratio.verdict}"
            lines.append(line + ("" if self.settled[name] else "   warm-up NOT settled"))
        return "\n".join(lines)


def interleaved(
    contenders: Mapping[str, Contender | str | os.PathLike[str]],
    options: SessionOptions | None = None,
    *,
    inputs: str | os.PathLike[str] | None = None,
    baseline: str | None = None,
    rows: int = 1,
    blocks: int = 40,
    block_runs: int = 10,
    statistic: str = "median",
    noise_floor: float = 0.01,
    warmup_seconds: float = 5.0,
    timeout_s: float = 900.0,
    seed: int = 0,
    **given: Unpack[SessionKeywords],
) -> Interleaved:
    """Measures several artefacts in one fresh process, in blocks of random order.

    Args:
        contenders: name -> bundle, .onnx file or `Contender`.
        options: of all sessions, as in `session.load`; thresholds, operating point and layout are each contender's own.
        inputs: .npz or .npy for every contender that has none of its own.
        baseline: the name that ratios refer to; None: the first.
        rows: rows per run.
        blocks: number of pairs.
        block_runs: timed runs of every artefact in a block, on the same inputs for all.
        statistic: ``median`` or ``mean`` of a block; the mean where a mix of exits is to count.
        noise_floor: see `paired.paired_ratio`.
        warmup_seconds: longest warm-up of each artefact.
        timeout_s: the measuring process is stopped after this.
        seed: of the orders and the bootstrap.
        given: as in `session.load`.

    Raises:
        InputError: fewer than one contender, a bare .onnx without inputs, an unknown option.
        ProviderError: as in `session.load`.
        EdgewrightError: the measuring process crashed or was stopped.
    """
    if not contenders:
        raise InputError("nothing to measure: give at least one bundle or .onnx file")
    baseline = baseline if baseline is not None else next(iter(contenders))
    if baseline not in contenders:
        raise InputError(f"the baseline {baseline!r} is none of {', '.join(contenders)}")
    if statistic not in _STATISTICS:
        raise InputError(f"unknown statistic {statistic!r}: use {' or '.join(_STATISTICS)}")
    options = SessionOptions.of(options, given).without(
        "thresholds",
        "operating_point",
        "layout",
        because="thresholds, operating point and layout belong to one side of a comparison: give them to its Contender",
    )
    settings = block_settings(
        "interleaved", options, blocks=blocks, block_runs=block_runs, warmup_seconds=warmup_seconds, seed=seed
    )
    with ExitStack() as stack:
        artefacts = [
            _artefact(name, side if isinstance(side, Contender) else Contender(side), options, inputs, rows, stack)
            for name, side in contenders.items()
        ]
        result = run_child(artefacts, settings, timeout_s)
    if result.status != "ok":
        raise EdgewrightError(f"the comparison of {', '.join(contenders)} {result.status}: {result.reason}")
    samples = dict(zip(contenders, result.samples, strict=True))
    figures = {
        name: np.median(values, axis=1) if statistic == "median" else values.mean(axis=1)
        for name, values in samples.items()
    }
    ratios = {
        name: paired_ratio(figures[baseline], values, noise_floor=noise_floor, seed=seed)
        for name, values in figures.items()
        if name != baseline
    }
    warm, placements = result.answer["warmup"], result.answer["placement"]
    for placement in placements:
        warn_of_fallback(placement)  # the warning of the measuring process was not seen
    return Interleaved(
        samples_ns=samples,
        exits=dict(zip(contenders, result.exits, strict=True)),
        ratios=ratios,
        baseline=baseline,
        settled={name: bool(entry["settled"]) for name, entry in zip(contenders, warm, strict=True)},
        statistic=statistic,
        settings={**settings, "rows_per_run": rows},
        placements=dict(zip(contenders, placements, strict=True)),
    )


def _artefact(
    name: str,
    side: Contender,
    shared: SessionOptions,
    shared_inputs: str | os.PathLike[str] | None,
    rows: int,
    stack: ExitStack,
) -> Artefact:
    path = Path(side.path)
    options = shared.replaced(thresholds=side.thresholds, operating_point=side.operating_point, layout=side.layout)
    inputs = side.inputs if side.inputs is not None else shared_inputs
    given = read_inputs(inputs) if inputs is not None else None
    if path.is_file() and path.suffix == ".onnx":
        if not isinstance(given, dict):
            raise InputError(f"{path} is a bare model: give its inputs as an .npz with one array per input")
        return Artefact(name, path, not_zero(cut(given, rows)[:MOST_FEEDS]), None, options.on_bare(path))
    bundle = stack.enter_context(open_bundle(path))
    manifest = bundle.manifest
    if given is None:
        feeds = golden_feeds(bundle, rows)
    else:
        feeds = user_feeds(given, manifest.inputs, manifest.preprocessing, rows)
    return Artefact(name, bundle.path(MODEL_FILE), feeds, bundle, options.on(manifest))
