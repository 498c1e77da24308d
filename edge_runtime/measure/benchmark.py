"""Measuring one artefact: a fresh process, real inputs, every sample kept, no number without its bound."""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import MODEL_FILE, Manifest
from ..device import collect_facts, fingerprint
from ..errors import InputError
from ..inference.providers import provider_names, warn_of_fallback
from ..inference.session import OPTIMIZATION_LEVELS, explicit_thresholds, require_layout
from ..process.plain_text import printable
from . import statistics
from .bench_inputs import Feed, golden_feeds, read_inputs, user_feeds
from .child import Artefact, ChildResult, run_child

SCHEMA_VERSION = 1
_PERCENTILES = (50.0, 90.0, 95.0, 99.0)


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    providers: Sequence[str] | str | None = None,
    threads: int | None = None,
    thresholds: Sequence[float] | None = None,
    operating_point: str | None = None,
    *,
    allow_fallback: bool = False,
    optimization_level: str = "all",
    layout: str = "file",
    inputs: str | os.PathLike[str] | NDArray[Any] | Mapping[str, NDArray[Any]] | None = None,
    rows: int = 1,
    percentiles: Sequence[float] = (),
    min_seconds: float = 3.0,
    min_samples: int = 64,
    max_seconds: float = 300.0,
    timeout_s: float = 900.0,
    seed: int = 0,
    samples_file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measures the latency of a bundle on this machine.

    Args:
        bundle: folder, zip or open `Bundle`.
        providers: as in `session.load`.
        threads: as in `session.load`.
        thresholds: as in `session.load`.
        operating_point: as in `session.load`.
        allow_fallback: as in `session.load`.
        optimization_level: as in `session.load`.
        layout: as in `session.load`.
        inputs: .npy or .npz file, array or mapping; None: the bundle's own natural golden inputs.
        rows: rows per run; more than 1 needs a bundle with a dynamic batch.
        percentiles: percentiles that must be there: the run is long enough for each.
        min_seconds: shortest measurement.
        min_samples: fewest samples.
        max_seconds: longest measurement, whatever the two above say.
        timeout_s: the measuring process is stopped after this.
        seed: of the order of the inputs and of the bootstrap.
        samples_file: .npy for the samples (int64 ns); None: they are part of the row.

    Returns:
        A row of the report, schema_version 1. A field that is not known is None, and ``reasons`` says why.
        ``status`` is ``ok``, ``crashed`` or ``timeout``.

    Raises:
        BundleError: the bundle is not intact.
        InputError: an option or input that does not fit.
        ProviderError: the provider is not there, or does not take every node.
    """
    if optimization_level not in OPTIMIZATION_LEVELS:
        raise InputError(f"unknown optimization level {optimization_level!r}")
    for percentile in percentiles:
        if not 0 < percentile < 100:
            raise InputError(f"a percentile lies between 0 and 100, not {percentile}")
        min_samples = max(min_samples, statistics.samples_needed(percentile))
    if not min_seconds < math.inf or min_samples < 1:
        raise InputError(f"min_seconds is finite and min_samples positive, not {min_seconds} and {min_samples}")
    if samples_file is not None and not Path(samples_file).resolve().parent.is_dir():
        raise InputError(f"cannot write the samples to {samples_file}: there is no such folder")
    settings: dict[str, Any] = {
        "mode": "single",
        "providers": list(provider_names(providers)),
        "threads": threads,
        "allow_fallback": allow_fallback,
        "optimization_level": optimization_level,
        "layout": layout,
        "min_seconds": min_seconds,
        "min_samples": min_samples,
        "max_seconds": max_seconds,
        "seed": seed,
    }
    with ExitStack() as stack:
        opened = bundle if isinstance(bundle, Bundle) else stack.enter_context(open_bundle(bundle))
        manifest = opened.manifest
        feeds, source = _feeds(opened, inputs, rows)
        chosen = explicit_thresholds(manifest, thresholds, operating_point)
        require_layout(manifest, layout)
        artefact = Artefact(manifest.name, opened.path(MODEL_FILE), feeds, opened, chosen, layout)
        row = _row_head(opened, settings, chosen, operating_point)
        result = run_child([artefact], settings, timeout_s)
    row["scenario"] = {
        "kind": "back_to_back",
        "rows_per_run": rows,
        "inputs": source,
        "distinct_inputs": len(feeds),
        "seed": seed,
        "n": int(result.samples.size),
        "duration_s": result.answer.get("duration_s"),
        "warmup": result.answer.get("warmup"),
    }
    _add_result(row, result, manifest, sorted({*_PERCENTILES, *percentiles}), seed)
    _add_samples(row, result, samples_file)
    return row


def bench_text(row: Mapping[str, Any]) -> str:
    """A row of `bench` on one screen."""
    head = f"{printable(row['artefact']['name'])}: {', '.join(row['ep']['session'] or row['ep']['requested'])}, "
    head += f"threads {row['session']['intra'] or 'default'}, boundary {row['boundary']}"
    if row["status"] != "ok":
        return f"{head}\n  {row['status'].upper()}: {row['reasons']['status']}"
    latency, scenario, phases = row["latency_ms"], row["scenario"], row["phases_ms"]
    low, high = latency["p50_ci95"]
    lines = [head, *(f"  FALLBACK: {reason}" for reason in row["ep"]["fallback"])]
    lines += [f"  p50  {latency['p50']:.4g} ms   95 % interval {low:.4g} to {high:.4g}"]
    for name in [key for key in latency if key.startswith("p") and key[1:].replace(".", "").isdigit()]:
        if name == "p50":
            continue
        if latency[name] is None:
            lines.append(f"  {name}  -   {row['reasons'][f'latency_ms.{name}']}")
        else:
            bound = latency[f"{name}_bound99"]
            lines.append(f"  {name}  {latency[name]:.4g} ms   at most {bound:.4g} with 99 % confidence")
    lines.append(f"  min {latency['min']:.4g}, mean {latency['mean']:.4g}, cov {latency['cov']:.1%} (ms)")
    settled = "settled" if scenario["warmup"]["settled"] else "NOT settled"
    lines.append(f"  {scenario['n']} samples, {scenario['distinct_inputs']} inputs, warm-up {settled}")
    lines.append(
        f"  cold start: import {phases['import']:.0f} ms, create {phases['create']:.1f} ms, "
        f"first run {phases['first_run']:.3g} ms"
    )
    if row["exits"] is not None:
        for index, share in enumerate(row["exits"]["p_exit"]):
            at = row["exits"]["latency_ms_per_exit"][index]
            lines.append(f"  exit {index}: {share:.1%} of runs, p50 {'-' if at is None else f'{at:.4g} ms'}")
    lines.append(f"  verdict: {row['verdict']['verdict']}")
    lines += [f"    {reason}" for reason in row["verdict"]["reasons"]]
    return "\n".join(lines)


def latency_figures(
    samples_ns: NDArray[np.int64], percentiles: Sequence[float] = _PERCENTILES, seed: int = 0
) -> tuple[dict[str, Any], dict[str, str]]:
    """The ``latency_ms`` part of a row.

    Args:
        samples_ns: int64 [N], N at least 1.
        percentiles: which ones to report.
        seed: of the bootstrap.

    Returns:
        The figures in ms, None where the samples cannot carry one, and the reasons by figure.
    """
    samples = samples_ns / 1e6
    figures: dict[str, Any] = {"p50": None, "p50_ci95": list(statistics.median_interval(samples, seed))}
    reasons: dict[str, str] = {}
    for percentile in percentiles:
        name = f"p{percentile:g}"
        bound = statistics.percentile_bound(samples, percentile)
        figures[name], figures[f"{name}_bound99"] = bound.value, bound.bound
        if bound.reason is not None:
            reasons[name] = bound.reason
    figures["p50"] = float(np.median(samples))  # the interval beside it says how little it may mean
    reasons.pop("p50", None)
    figures["min"], figures["mean"] = float(samples.min()), float(samples.mean())
    figures["max"] = float(samples.max())
    figures["mad"], figures["cov"] = statistics.mad(samples), statistics.cov(samples)
    return figures, reasons


def _feeds(bundle: Bundle, inputs: Any, rows: int) -> tuple[list[Feed], str]:
    manifest = bundle.manifest
    if rows != 1 and manifest.batch == "single":
        raise InputError(f"{manifest.name} takes one row a run, not {rows}")
    if inputs is None:
        return golden_feeds(bundle, rows), "golden cases of the bundle"
    source = "arrays of the caller"
    if isinstance(inputs, (str, os.PathLike)):
        source = Path(inputs).name
        inputs = read_inputs(inputs)
    return user_feeds(inputs, manifest.inputs, manifest.preprocessing, rows), source


def _row_head(
    bundle: Bundle, settings: Mapping[str, Any], thresholds: Sequence[float] | None, point: str | None
) -> dict[str, Any]:
    manifest = bundle.manifest
    points = manifest.operating_points
    stored = manifest.policy is not None and points and thresholds is None
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": uuid.uuid4().hex,
        "status": "ok",
        "artefact": {
            "name": manifest.name,
            "sha256": bundle.sha256,
            "model_sha256": manifest.files[MODEL_FILE].sha256,
            "unique_weight_bytes": manifest.ledger.unique_weight_bytes,
            "opset": manifest.opset,
            "ir_version": manifest.ir_version,
            "ops_by_exit": {
                str(level): sum(node.exit == level for node in manifest.nodes)
                for level in sorted({node.exit for node in manifest.nodes})
            },
            "if_count": sum(node.op == "If" for node in manifest.nodes),
            "exits": [exit_.name for exit_ in manifest.exits],
        },
        "target_profile": None,
        "ep": {
            "requested": settings["providers"],
            "session": None,
            "nodes_per_ep": None,
            "strict": None,
            "fallback": [],
        },
        "session": {
            "graph_opt_level": settings["optimization_level"],
            "intra": settings["threads"],
            "inter": 1,
            "io_binding": False,
            "cuda_graph": False,
            "thresholds": list(points[0].thresholds if stored else thresholds or []),
            "operating_point": points[0].name if stored else point,
            "layout": settings["layout"],
        },
        "boundary": "host",
    }


def _add_result(
    row: dict[str, Any], result: ChildResult, manifest: Manifest, percentiles: Sequence[float], seed: int
) -> None:
    facts = {name: value for name, (value, _) in collect_facts().items()}
    reasons = {
        "energy": "this version does not measure energy",
        "accuracy": "a benchmark has no labels; see the operating points of the manifest",
        "parity": "not part of a benchmark; run verify",
        "memory.gpu_used_delta_bytes": "this version does not read GPU memory",
        "target_profile": "none was given",
    }
    row.update(latency_ms=None, verdict=None, phases_ms=None, memory=None, exits=None)
    row.update(energy=None, accuracy=None, parity=None)
    row["device"] = {"fingerprint": fingerprint(facts), "facts": facts, "load_average": None}
    row["status"] = result.status
    if result.status != "ok":
        reasons["status"] = result.reason or "unknown"
        row["reasons"] = reasons
        return
    answer = result.answer
    placement = answer["placement"]
    row["ep"].update(
        session=placement["session"],
        nodes_per_ep=placement["nodes_per_provider"],
        strict=placement["strict"],
        method=placement["method"],
        fallback=placement["fallback"],
    )
    warn_of_fallback(placement)  # the warning of the measuring process was not seen
    if placement["nodes_per_provider"] is None:
        reasons["ep.nodes_per_ep"] = "this ONNX Runtime does not record the placement of nodes"
    if row["session"]["intra"] is None:
        reasons["session.intra"] = "left to ONNX Runtime, which takes the physical cores"
    row["latency_ms"], unsupported = latency_figures(result.samples, percentiles, seed)
    reasons.update({f"latency_ms.{name}": reason for name, reason in unsupported.items()})
    has_exits = manifest.policy is not None
    verdict = statistics.stability(result.samples, result.exits if has_exits else None)
    row["verdict"] = verdict.to_dict()
    row["phases_ms"] = answer["phases_ms"]
    row["memory"] = {**answer["memory"], "gpu_used_delta_bytes": None}
    for name in ("rss_create_delta_bytes", "rss_run_peak_bytes"):
        if row["memory"][name] is None:
            reasons[f"memory.{name}"] = "there is no /proc/self/status"
    row["device"]["load_average"] = answer["load_average"]
    row["exits"] = _exit_figures(result, len(manifest.exits)) if has_exits else None
    if not has_exits:
        reasons["exits"] = "the model has no early exits"
    row["reasons"] = reasons


def _exit_figures(result: ChildResult, count: int) -> dict[str, Any]:
    """Share and latency per exit, over the runs that were made: the mix is that of the inputs."""
    runs = Counter(result.exits.tolist())
    per_exit: list[float | None] = []
    for index in range(count):
        samples = result.samples[result.exits == index]
        per_exit.append(float(np.median(samples)) / 1e6 if samples.size else None)
    return {
        "n": [runs[index] for index in range(count)],
        "p_exit": [runs[index] / result.exits.size for index in range(count)],
        "latency_ms_per_exit": per_exit,
        "expected_latency_ms": float(result.samples.mean()) / 1e6,
    }


def _add_samples(row: dict[str, Any], result: ChildResult, samples_file: str | os.PathLike[str] | None) -> None:
    row["samples_file"] = row["samples_ns"] = None
    row["sample_exits"] = result.exits.tolist() if row["exits"] is not None else None
    if samples_file is None:
        row["samples_ns"] = result.samples.tolist()
        row["reasons"]["samples_file"] = "the samples are in samples_ns"
        return
    path = Path(samples_file)
    try:
        with path.open("wb") as stream:
            np.save(stream, result.samples, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot write the samples to {path}: {error}") from None
    row["samples_file"] = path.name
    row["reasons"]["samples_ns"] = "the samples are in samples_file"
