"""Measuring one artefact: a fresh process, real inputs, every sample kept, no number without its bound."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import MODEL_FILE, Manifest
from ..device import collect_facts, fingerprint
from ..errors import InputError
from ..inference.options import SessionKeywords, SessionOptions
from ..inference.providers import warn_of_fallback
from ..process.plain_text import printable
from . import statistics
from .bench_inputs import Feed, golden_feeds, read_inputs, user_feeds
from .child import Artefact, ChildResult, check_seed, run_child

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCHEMA_VERSION = 1
_PERCENTILES = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True)
class BenchRow:
    """What `bench` found. A field that is not known is None, and `reasons` says why; ``row["status"]`` reads one too.

    Attributes:
        schema_version: of the JSON.
        run_id: of this measurement alone.
        status: ``ok``, ``crashed`` or ``timeout``.
        artefact: the bundle: name, hashes, size, operators and exits.
        target_profile: of the device it is for.
        ep: which execution providers were asked for, and which took how many nodes.
        session: its options.
        boundary: what the clock runs around: ``host``, numpy arrays in and out.
        scenario: how it was run: inputs, rows a run, number and duration of the runs, warm-up.
        latency_ms: median, percentiles and the rest of `latency_figures`.
        verdict: whether the measurement was stable.
        phases_ms: import, creating the session, first run.
        memory: bytes of the process.
        exits: share and latency of each exit; None for a model without exits.
        energy: of a run.
        accuracy: on the inputs.
        parity: with what was recorded.
        device: facts about the machine, its fingerprint and its load.
        reasons: field -> why it is None.
        samples_file: name of the file with the samples.
        samples_ns: the samples, where they are in no file.
        sample_exits: exit of every sample; None for a model without exits.
    """

    schema_version: int
    run_id: str
    status: str
    artefact: Mapping[str, Any]
    target_profile: str | None
    ep: Mapping[str, Any]
    session: Mapping[str, Any]
    boundary: str
    scenario: Mapping[str, Any]
    latency_ms: Mapping[str, Any] | None
    verdict: Mapping[str, Any] | None
    phases_ms: Mapping[str, float] | None
    memory: Mapping[str, int | None] | None
    exits: Mapping[str, Any] | None
    energy: None
    accuracy: None
    parity: None
    device: Mapping[str, Any]
    reasons: Mapping[str, str]
    samples_file: str | None
    samples_ns: Sequence[int] | None
    sample_exits: Sequence[int] | None

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=2, allow_nan=False) + "\n"

    def text(self) -> str:
        """The row on one screen."""
        head = f"{printable(self.artefact['name'])}: {', '.join(self.ep['session'] or self.ep['requested'])}, "
        head += f"threads {self.session['intra'] or 'default'}, boundary {self.boundary}"
        if self.latency_ms is None or self.phases_ms is None or self.verdict is None:
            return f"{head}\n  {self.status.upper()}: {self.reasons['status']}"
        latency, scenario, phases = self.latency_ms, self.scenario, self.phases_ms
        lines = [head, *(f"  FALLBACK: {reason}" for reason in self.ep["fallback"]), *self._percentile_lines(latency)]
        lines.append(f"  min {latency['min']:.4g}, mean {latency['mean']:.4g}, cov {latency['cov']:.1%} (ms)")
        settled = "settled" if scenario["warmup"]["settled"] else "NOT settled"
        lines.append(f"  {scenario['n']} samples, {scenario['distinct_inputs']} inputs, warm-up {settled}")
        lines.append(
            f"  cold start: import {phases['import']:.0f} ms, create {phases['create']:.1f} ms, "
            f"first run {phases['first_run']:.3g} ms"
        )
        if self.exits is not None:
            for index, share in enumerate(self.exits["p_exit"]):
                at = self.exits["latency_ms_per_exit"][index]
                lines.append(f"  exit {index}: {share:.1%} of runs, p50 {'-' if at is None else f'{at:.4g} ms'}")
        lines.append(f"  verdict: {self.verdict['verdict']}")
        lines += [f"    {reason}" for reason in self.verdict["reasons"]]
        return "\n".join(lines)

    def _percentile_lines(self, latency: Mapping[str, Any]) -> list[str]:
        low, high = latency["p50_ci95"]
        lines = [f"  p50  {latency['p50']:.4g} ms   95 % interval {low:.4g} to {high:.4g}"]
        for name in [key for key in latency if key.startswith("p") and key[1:].replace(".", "").isdigit()]:
            if name == "p50":
                continue
            if latency[name] is None:
                lines.append(f"  {name}  -   {self.reasons[f'latency_ms.{name}']}")
            else:
                bound = latency[f"{name}_bound99"]
                lines.append(f"  {name}  {latency[name]:.4g} ms   at most {bound:.4g} with 99 % confidence")
        return lines


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    options: SessionOptions | None = None,
    *,
    inputs: str | os.PathLike[str] | NDArray[Any] | Mapping[str, NDArray[Any]] | None = None,
    rows: int = 1,
    percentiles: Sequence[float] = (),
    min_seconds: float = 3.0,
    min_samples: int = 64,
    max_seconds: float = 300.0,
    timeout_s: float = 900.0,
    seed: int = 0,
    samples_file: str | os.PathLike[str] | None = None,
    **given: Unpack[SessionKeywords],
) -> BenchRow:
    """Measures the latency of a bundle on this machine.

    Args:
        bundle: folder, zip or open `Bundle`.
        options: as in `session.load`.
        inputs: .npy or .npz file, array or mapping; None: the bundle's own natural golden inputs.
        rows: rows per run; more than 1 needs a bundle with a dynamic batch.
        percentiles: percentiles that must be there: the run is long enough for each.
        min_seconds: shortest measurement.
        min_samples: fewest samples.
        max_seconds: longest measurement, whatever the two above say.
        timeout_s: the measuring process is stopped after this.
        seed: of the order of the inputs and of the bootstrap.
        samples_file: .npy for the samples (int64 ns); None: they are part of the row.
        given: as in `session.load`.

    Raises:
        BundleError: the bundle is not intact.
        InputError: an option or input that does not fit.
        ProviderError: the provider is not there, or does not take every node.
    """
    options = SessionOptions.of(options, given)
    for percentile in percentiles:
        if not 0 < percentile < 100:
            raise InputError(f"a percentile lies between 0 and 100, not {percentile}")
        min_samples = max(min_samples, statistics.samples_needed(percentile))
    if not min_seconds < math.inf or min_samples < 1:
        raise InputError(f"min_seconds is finite and min_samples positive, not {min_seconds} and {min_samples}")
    check_seed(seed)
    if samples_file is not None and not Path(samples_file).resolve().parent.is_dir():
        raise InputError(f"cannot write the samples to {samples_file}: there is no such folder")
    settings = {
        "mode": "single",
        "min_seconds": min_seconds,
        "min_samples": min_samples,
        "max_seconds": max_seconds,
        "seed": seed,
    }
    with ExitStack() as stack:
        opened = bundle if isinstance(bundle, Bundle) else stack.enter_context(open_bundle(bundle))
        manifest = opened.manifest
        feeds, source = _feeds(opened, inputs, rows)
        artefact = Artefact(manifest.name, opened.path(MODEL_FILE), feeds, opened, options.on(manifest))
        described = _described(opened)
        result = run_child([artefact], settings, timeout_s)
    scenario = {
        "kind": "back_to_back",
        "rows_per_run": rows,
        "inputs": source,
        "distinct_inputs": len(feeds),
        "seed": seed,
        "n": int(result.samples.size),
        "duration_s": result.answer.get("duration_s"),
        "warmup": result.answer.get("warmup"),
    }
    return _row(
        result,
        artefact=described,
        session=_session_facts(options, artefact.options, manifest),
        requested=list(options.providers),
        scenario=scenario,
        manifest=manifest,
        percentiles=sorted({*_PERCENTILES, *percentiles}),
        samples_file=None if samples_file is None else Path(samples_file),
    )


def bench_text(row: BenchRow | Mapping[str, Any]) -> str:
    """A row of `bench`, or one that was read from its JSON, on one screen."""
    return (row if isinstance(row, BenchRow) else BenchRow(**row)).text()


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


def _described(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
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
    }


def _session_facts(asked: SessionOptions, used: SessionOptions, manifest: Manifest) -> dict[str, Any]:
    """The options, as they were `asked` for and as they were `used` with this bundle."""
    points = manifest.operating_points
    stored = manifest.policy is not None and points and used.thresholds is None
    return {
        "graph_opt_level": used.optimization_level,
        "intra": used.threads,
        "inter": 1,
        "io_binding": False,
        "cuda_graph": False,
        "thresholds": list(points[0].thresholds if stored else used.thresholds or []),
        "operating_point": points[0].name if stored else asked.operating_point,
        "layout": used.layout,
    }


def _row(
    result: ChildResult,
    *,
    artefact: Mapping[str, Any],
    session: Mapping[str, Any],
    requested: Sequence[str],
    scenario: Mapping[str, Any],
    manifest: Manifest,
    percentiles: Sequence[float],
    samples_file: Path | None,
) -> BenchRow:
    reasons = {
        "energy": "this version does not measure energy",
        "accuracy": "a benchmark has no labels; see the operating points of the manifest",
        "parity": "not part of a benchmark; run verify",
        "memory.gpu_used_delta_bytes": "this version does not read GPU memory",
        "target_profile": "none was given",
    }
    ep: dict[str, Any] = {
        "requested": requested,
        "session": None,
        "nodes_per_ep": None,
        "strict": None,
        "fallback": [],
    }
    figures: dict[str, Any] = dict.fromkeys(("latency_ms", "verdict", "phases_ms", "memory", "exits"))
    if result.status == "ok":
        ep.update(_took(result.answer["placement"], reasons))
        if session["intra"] is None:
            reasons["session.intra"] = "left to ONNX Runtime, which takes the physical cores"
        figures = _figures(result, manifest, percentiles, scenario["seed"], reasons)
    else:
        reasons["status"] = result.reason or "unknown"
    facts = {name: value for name, (value, _) in collect_facts().items()}
    return BenchRow(
        schema_version=SCHEMA_VERSION,
        run_id=uuid.uuid4().hex,
        status=result.status,
        artefact=artefact,
        target_profile=None,
        ep=ep,
        session=session,
        boundary="host",
        scenario=scenario,
        **figures,
        energy=None,
        accuracy=None,
        parity=None,
        device={
            "fingerprint": fingerprint(facts),
            "facts": facts,
            "load_average": result.answer.get("load_average"),
        },
        samples_file=_written(result, samples_file, reasons),
        reasons=reasons,
        samples_ns=result.samples.tolist() if samples_file is None else None,
        sample_exits=result.exits.tolist() if figures["exits"] is not None else None,
    )


def _took(placement: Mapping[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    """Which providers took the nodes; adds to `reasons`."""
    warn_of_fallback(placement)  # the warning of the measuring process was not seen
    if placement["nodes_per_provider"] is None:
        reasons["ep.nodes_per_ep"] = "this ONNX Runtime does not record the placement of nodes"
    return {
        "session": placement["session"],
        "nodes_per_ep": placement["nodes_per_provider"],
        "strict": placement["strict"],
        "method": placement["method"],
        "fallback": placement["fallback"],
    }


def _figures(
    result: ChildResult, manifest: Manifest, percentiles: Sequence[float], seed: int, reasons: dict[str, str]
) -> dict[str, Any]:
    """What was measured, by field of the row; adds to `reasons`."""
    latency, unsupported = latency_figures(result.samples, percentiles, seed)
    reasons.update({f"latency_ms.{name}": reason for name, reason in unsupported.items()})
    has_exits = manifest.policy is not None
    memory = {**result.answer["memory"], "gpu_used_delta_bytes": None}
    for name in ("rss_create_delta_bytes", "rss_run_peak_bytes"):
        if memory[name] is None:
            reasons[f"memory.{name}"] = "there is no /proc/self/status"
    if not has_exits:
        reasons["exits"] = "the model has no early exits"
    return {
        "latency_ms": latency,
        "verdict": statistics.stability(result.samples, result.exits if has_exits else None).to_dict(),
        "phases_ms": result.answer["phases_ms"],
        "memory": memory,
        "exits": _exit_figures(result, len(manifest.exits)) if has_exits else None,
    }


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


def _written(result: ChildResult, path: Path | None, reasons: dict[str, str]) -> str | None:
    """Writes the samples, where they belong into a file; returns its name, and adds to `reasons`."""
    if path is None:
        reasons["samples_file"] = "the samples are in samples_ns"
        return None
    try:
        with path.open("wb") as stream:
            np.save(stream, result.samples, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot write the samples to {path}: {error}") from None
    reasons["samples_ns"] = "the samples are in samples_file"
    return path.name
