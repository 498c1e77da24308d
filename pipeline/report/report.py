"""What a run found: report.json for programs, report.html for people, both from the same data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.edge_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from edgewright.edge_runtime.versions import versions
from edgewright.models.layers.multi_exit import MultiExit

from ..stage import Json
from ..stages.class_aware_pruning.report import class_counts
from ..stages.early_exit.analysis import ExitAnalysis, analyse_exits
from ..stages.early_exit.mix import REPORT_SCHEMA_VERSION, break_even_text, mix_cost
from ..store.atomic import plain, pretty_json, write_text
from ..store.checkpoint import LIBRARIES, load_checkpoint
from ..task import Task, split_of
from .steps import StepRow

if TYPE_CHECKING:
    from ..runs.runner import RunResult

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def write_report(result: RunResult, task: Task, root: Path) -> Path:
    """Writes report.json and report.html into the run's folder.

    Args:
        result: the finished run.
        task: for labels and the test split.
        root: where the recipe's ``python:`` sources lie.

    Returns:
        Path of report.json.
    """
    report = build_report(result, task, root)
    path = result.out / JSON_FILE
    write_text(path, pretty_json(plain(report)))
    write_text(result.out / HTML_FILE, render_html(report))
    return path


def build_report(result: RunResult, task: Task, root: Path) -> dict[str, Json]:
    """The content of report.json."""
    manifest = Manifest.from_json((result.bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    steps = [{**dataclasses.asdict(row), "control": row.step in result.controls} for row in result.steps]
    chain = [row for row in result.steps if row.step not in result.controls]
    final, reference = chain[-1], next(row for row in chain if row.step == result.reference)
    model = load_checkpoint(result.out / final.checkpoint, root)
    layer = result.recipe.report.layer
    counts = [found for row in chain if (found := _class_counts(row, result.out, task, layer)) is not None]
    exits: dict[str, Json] | None = None
    if isinstance(model, MultiExit):
        by_step = {m["step"]: m for m in result.measurements if m["status"] == "ok"}
        measured = by_step.get(final.step)
        before = by_step.get(chain[-2].step) if len(chain) > 1 else None
        analysis = analyse_exits(model, split_of(task, "test", needed_by="the report"))
        exits = _exits(analysis, manifest, measured, None if before is None else before["latency_ms"]["p50"])
    return {
        "schema_version": REPORT_SCHEMA_VERSION,
        "name": result.recipe.name or task.name,
        "task": {
            "name": task.name,
            "labels": list(task.labels),
            "test_rows": len(task.splits["test"]),
            "provenance": dict(task.provenance),
        },
        "reference": result.reference,
        "final": final.step,
        "summary": _summary(reference, final, result.comparison),
        "steps": steps,
        "measurements": [dict(m) for m in result.measurements],
        "parity": dataclasses.asdict(manifest.parity),
        "exits": exits,
        "class_counts": counts,
        "operating_points": [dataclasses.asdict(p) for p in manifest.operating_points],
        "ledger": {k: v for k, v in dataclasses.asdict(manifest.ledger).items() if k != "rows"},
        "notes": [f"{row.step}: {note}" for row in result.steps for note in row.notes]
        + [f"export: {note}" for note in manifest.notes]
        + _layer_not_found(layer, counts),
        "environment": versions(LIBRARIES),
        "bundle": result.bundle.relative_to(result.out).as_posix(),
    }


def _summary(reference: StepRow, final: StepRow, comparison: Mapping[str, Json] | None) -> dict[str, Json]:
    # a network that knows fewer classes is judged on their samples only: no difference to draw
    alike = len(reference.per_class) == len(final.per_class)
    return {
        "quality_change": final.quality - reference.quality if alike else None,
        "accuracy_change": _change(reference.accuracy, final.accuracy) if alike else None,
        "worst_class_accuracy_change": _change(reference.worst_class_accuracy, final.worst_class_accuracy)
        if alike
        else None,
        "macs_reduction": reference.macs / final.macs if final.macs else None,
        "bytes_reduction": reference.unique_weight_bytes / final.unique_weight_bytes if final.parameters else None,
        "parameters_reduction": reference.parameters / final.parameters if final.parameters else None,
        "latency_ratio": comparison,
    }


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _class_counts(row: StepRow, out: Path, task: Task, layer: str | None) -> Json | None:
    return class_counts(row.step, out / row.checkpoint, row.metrics.get("classes") or task.labels, layer)


def _layer_not_found(layer: str | None, counts: Sequence[Json]) -> list[str]:
    if layer is None or any(found["layer"]["asked"] for found in counts):
        return []
    scored = list(dict.fromkeys(entry["path"] for found in counts for entry in found["layers"]))
    known = f"layers with class counts are {', '.join(scored)}" if scored else "no stage of this run counted classes"
    return [f"report.layer names {layer!r}, which has none to draw: {known}"]


def _exits(
    analysis: ExitAnalysis, manifest: Manifest, measured: Mapping[str, Json] | None, plain_ms: float | None
) -> dict[str, Json]:
    total = max(1, sum(analysis.rows))
    latency: Sequence[float | None] = [None] * len(analysis.rows)
    if measured is not None and measured.get("exits"):
        latency = measured["exits"]["latency_ms_per_exit"]
    wrong: list[float | None] = [*analysis.wrong_exclusions, None] if analysis.wrong_exclusions else []
    table = [
        {
            "name": spec.name,
            "share": analysis.rows[spec.index] / total,
            "accuracy": analysis.accuracy[spec.index],
            "head_accuracy": analysis.head_accuracy[spec.index],
            "macs": spec.macs,
            "p50_ms": latency[spec.index],
            "wrong_exclusion": wrong[spec.index] if wrong else None,
        }
        for spec in manifest.exits
    ]
    mix = [rows / total for rows in analysis.rows]
    cost = mix_cost(mix, latency, plain_ms, [spec.macs for spec in manifest.exits])
    return {
        "policy": manifest.policy.name if manifest.policy else None,
        "table": table,
        "cost": {**dataclasses.asdict(cost), "break_even_text": break_even_text(cost)},
        **dataclasses.asdict(analysis),
    }


def render_html(report: Mapping[str, Json]) -> str:
    """The page: one file that opens offline, no script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgewright.pipeline.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2")
    final = next(s for s in report["steps"] if s["step"] == report["final"])
    return page.render(
        report={**report, "environment": json.dumps(report["environment"], indent=2, sort_keys=True)},
        final=final,
        classes=final["accuracy"] is not None,
        plots=_plots(report),
        pct=lambda v: "–" if v is None else f"{100 * v:.2f} %",
        points=lambda v: "–" if v is None else f"{100 * v:+.2f} points",
        ratio=lambda v: "–" if v is None else f"{v:.2f}",
        ms=lambda v: "–" if v is None else f"{v:.3g}",
        si=_si,
    )


def _plots(report: Mapping[str, Json]) -> dict[str, str | None]:
    from . import plots

    samples = {m["step"]: np.asarray(m["samples_ns"]) / 1e6 for m in report["measurements"] if m.get("samples_ns")}
    found: dict[str, str | None] = {
        "tradeoff": plots.tradeoff(_trained(report)),
        "latencies": plots.latencies(samples) if samples else None,
        "surviving_classes": None,
    }
    for counts in report["class_counts"]:
        found[f"class_counts.{counts['step']}"] = plots.class_counts(counts)
        found[f"class_table.{counts['step']}"] = plots.class_table(counts["layer"])
    if report["exits"] is not None:
        exits = report["exits"]
        names = [row["name"] for row in exits["table"]]
        found["exit_histogram"] = plots.exit_histogram(names, exits["rows"], exits["accuracy"])
        found["depth_per_class"] = plots.depth_per_class(names, report["task"]["labels"], exits["per_class"])
        if exits["survivors"]:
            found["surviving_classes"] = plots.surviving_classes(names, exits["survivors"])
    return found


def _trained(report: Mapping[str, Json]) -> list[Json]:
    """The steps from the reference on: an untrained network would leave no room for the others in a plot."""
    names = [row["step"] for row in report["steps"]]
    steps: list[Json] = report["steps"][names.index(report["reference"]) :]
    return steps


def _si(value: Any) -> str:
    if value is None:
        return "–"
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.3g} "
