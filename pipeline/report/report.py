"""What a run found: report.json for programs, report.html for people, both from the same data."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.edge_runtime.bundle.manifest import Manifest
from edgewright.edge_runtime.measure.paired import Drop
from edgewright.edge_runtime.versions import versions

from ..quality_drop import drop_text, no_promise
from ..section import REPORT_SCHEMA_VERSION, FinishedStage, Section, milliseconds, percent, short_count
from ..stage import Json
from ..stage_registry import stage_named
from ..store.atomic import plain, pretty_json, write_text
from ..store.cache import read_artifacts
from ..store.checkpoint import LIBRARIES, load_checkpoint
from ..task import Task, names_of_classes
from .result import RunResult
from .steps import StepRow

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def write_report(result: RunResult, tasks: Sequence[Task], root: Path) -> Path:
    """Writes report.json and report.html into the run's folder.

    Args:
        result: the finished run.
        tasks: the task before all stages, and after each; for labels and the test split.
        root: where the recipe's ``python:`` sources lie.

    Returns:
        Path of report.json.
    """
    report = plain(build_report(result, tasks, root))
    path = result.out / JSON_FILE
    write_text(path, pretty_json(report))
    write_text(result.out / HTML_FILE, render_html(report))
    return path


def build_report(result: RunResult, tasks: Sequence[Task], root: Path) -> dict[str, Json]:
    """The content of report.json."""
    task = tasks[-1]
    manifest = result.manifest
    steps = [
        {**dataclasses.asdict(row), "control": row.step in result.controls, "drop": _drop(result.drops.get(row.step))}
        for row in result.steps
    ]
    chain = [row for row in result.steps if row.step not in result.controls]
    final, reference = chain[-1], next(row for row in chain if row.step == result.reference)
    sections = list(_sections(result, chain, tasks, manifest, root))
    alike = names_of_classes(tasks[chain.index(reference)]) == names_of_classes(task)
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
        "summary": {
            **_summary(reference, final, result.comparison, alike),
            "quality_drop": task.metric.drop(reference.quality, final.quality) if alike else None,
            "drop": _drop(result.drops.get(final.step)),
            "accuracy_drop": _drop(result.accuracy_drop),
        },
        "steps": steps,
        "measurements": [dict(m) for m in result.measurements],
        "parity": dataclasses.asdict(manifest.parity),
        "sections": [
            {"step": row.step, "stage": row.stage, **dataclasses.asdict(section)} for row, section in sections
        ],
        "ledger": {k: v for k, v in dataclasses.asdict(manifest.ledger).items() if k != "rows"},
        "notes": [f"{row.step}: {note}" for row in result.steps for note in row.notes]
        + [f"{row.step}: {note}" for row, section in sections for note in section.notes]
        + [f"export: {note}" for note in manifest.notes]
        + _two_counters(reference, final)
        + _unpromised(result, final.step)
        + _layer_not_found(result.recipe.report.layer, [section for _, section in sections]),
        "environment": versions(LIBRARIES),
        "bundle": result.bundle.relative_to(result.out).as_posix(),
    }


def _sections(
    result: RunResult, chain: Sequence[StepRow], tasks: Sequence[Task], manifest: Manifest, root: Path
) -> Iterator[tuple[StepRow, Section]]:
    """What the stages of the chain show of themselves, in order."""
    measured = {m["step"]: m for m in result.measurements if m["status"] == "ok"}
    final = chain[-1]
    before = measured.get(chain[-2].step) if len(chain) > 1 else None
    load = functools.cache(lambda: load_checkpoint(result.out / final.checkpoint, root))
    for row, entry, seen in zip(chain[1:], result.recipe.stages, tasks[1:], strict=True):
        show = stage_named(entry.name).report
        if show is None:
            continue
        finished = FinishedStage(
            step=row.step,
            metrics=row.metrics,
            artifacts=functools.partial(read_artifacts, result.out / row.checkpoint),
            labels=names_of_classes(seen),
            task=tasks[-1],
            model=load,
            manifest=manifest,
            measured=measured.get(final.step),
            plain_ms=None if before is None else before["latency_ms"]["p50"],
            layer=result.recipe.report.layer,
        )
        section = show(finished)
        if section is not None:
            yield row, section


def _summary(reference: StepRow, final: StepRow, comparison: Mapping[str, Json] | None, alike: bool) -> dict[str, Json]:
    # a network that knows fewer classes is judged on their samples only: no difference to draw
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


def _two_counters(reference: StepRow, final: StepRow) -> list[str]:
    if reference.macs_of == final.macs_of:
        return []
    return [
        f"the reduction of MACs sets PyTorch's count of {reference.step}, which was not exported, against the exported "
        f"graph's of {final.step}: with the benchmark enabled every step is exported, and the graph counts them all"
    ]


def _drop(drop: Drop | None) -> dict[str, Json] | None:
    return None if drop is None else drop.to_dict()


def _unpromised(result: RunResult, final: str) -> list[str]:
    """Where `require` is met by what was measured, and the rows do not carry it."""
    notes = []
    for field, drop in (("max_accuracy_drop", result.accuracy_drop), ("max_drop", result.drops.get(final))):
        wanted = getattr(result.recipe.require, field)
        reason = None if wanted is None or drop is None or drop.value > wanted else no_promise(drop, wanted)
        if reason is not None:
            notes.append(f"require.{field} is met on the test rows, and {reason}")
    return notes


def _layer_not_found(layer: str | None, sections: Sequence[Section]) -> list[str]:
    known = [path for section in sections for path in section.layers]
    if layer is None or layer in known:
        return []
    what = f"the layers that can be drawn are {', '.join(dict.fromkeys(known))}" if known else "no stage draws layers"
    return [f"report.layer names {layer!r}, which has none to draw: {what}"]


def render_html(report: Mapping[str, Json]) -> str:
    """The page: one file that opens offline, no script; drawn from the content of report.json alone."""
    import jinja2

    from . import plots

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgewright.pipeline.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["marked"] = _marked
    page = environment.get_template("report.html.j2")
    final = next(s for s in report["steps"] if s["step"] == report["final"])
    samples = {m["step"]: np.asarray(m["samples_ns"]) / 1e6 for m in report["measurements"] if m.get("samples_ns")}
    return page.render(
        report={**report, "environment": json.dumps(report["environment"], indent=2, sort_keys=True)},
        final=final,
        classes=final["accuracy"] is not None,
        tradeoff=plots.tradeoff(_trained(report)),
        latencies=plots.latencies(samples) if samples else None,
        draw=plots.draw,
        plots=tuple(plots.KINDS),
        wide=plots.WIDE,
        pct=percent,
        points=lambda v: "–" if v is None else f"{100 * v:+.2f} points",
        ratio=lambda v: "–" if v is None else f"{v:.2f}",
        ms=milliseconds,
        si=short_count,
        dropped=lambda found: "" if not found else drop_text(Drop(**found)),
    )


def _marked(text: str) -> Any:
    """`text` as HTML, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = [str(escape(part)) for part in text.split("`")]
    if len(parts) % 2 == 0:  # a backtick without its partner is a backtick
        parts[-2:] = ["`".join(parts[-2:])]
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def _trained(report: Mapping[str, Json]) -> list[Json]:
    """The steps from the reference on: an untrained network would leave no room for the others in a plot."""
    names = [row["step"] for row in report["steps"]]
    steps: list[Json] = report["steps"][names.index(report["reference"]) :]
    return steps
