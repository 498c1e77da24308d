"""What the report shows of exits: who leaves where, how right they are, what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgewright.models.layers.multi_exit import MultiExit

from ...section import (
    Bars,
    Block,
    FinishedStage,
    GroupedBars,
    Section,
    StackedBars,
    Table,
    Text,
    milliseconds,
    percent,
    short_count,
)
from ...stage import Json
from ...task import split_of
from .analysis import ExitAnalysis, analyse_exits
from .mix import MixCost, break_even_text, mix_cost

_MOST_CONFUSIONS = 12


def report(finished: FinishedStage) -> Section | None:
    """Runs the model that ships once over the test split; None if the stage found no place for an exit."""
    model = finished.model()
    if not isinstance(model, MultiExit):
        return None
    analysis = analyse_exits(model, split_of(finished.task, "test", needed_by="the report"))
    return section(analysis, finished, finished.labels)


def section(analysis: ExitAnalysis, finished: FinishedStage, labels: Sequence[str]) -> Section:
    """The section of an analysis.

    Args:
        analysis: of the test split.
        finished: gives the manifest and what was measured.
        labels: of the classes.
    """
    data = _data(analysis, finished)
    names = tuple(row["name"] for row in data["table"])
    shares = tuple(100 * row["share"] for row in data["table"])
    cost: Mapping[str, Json] = data["cost"]
    blocks: list[Block] = [_exits_table(data)]
    if cost["expected_ms"] is not None:
        without = "" if cost["plain_ms"] is None else f", without exits {milliseconds(cost['plain_ms'])} ms"
        sentence: str = cost["break_even_text"]
        blocks.append(
            Text(
                f"With this mix a row takes {milliseconds(cost['expected_ms'])} ms on average{without} (medians of "
                f"each exit, weighted by its share of the test rows). {sentence[:1].upper()}{sentence[1:]}. "
                "`edgewright mix` costs any other mix."
            )
        )
    blocks.append(
        Text(
            f"{analysis.lost} rows are wrong that the network's own end has right, {analysis.won} are right that it "
            "has wrong."
        )
    )
    texts = tuple("never" if value is None else f"{100 * value:.1f} % right" for value in analysis.accuracy)
    blocks.append(Bars(names, shares, texts, "rows leaving there (%)", "Where rows leave."))
    blocks.append(
        StackedBars(
            tuple(labels), names, _shares(analysis.per_class), "rows of the class (%), by exit",
            "How deep each class has to go.",
        )
    )  # fmt: skip
    if analysis.survivors:
        blocks.append(
            GroupedBars(
                tuple(f"after {name}" for name in names[:-1]),
                _shares([row[1:] for row in analysis.survivors]),
                "classes still possible",
                "rows that reach the exit (%)",
                "Classes still possible after each exit; a row with one left leaves.",
            )
        )
    blocks.append(_per_class(analysis, names, labels))
    blocks += _confusions(analysis, labels)
    return Section("Early exits", tuple(blocks), data)


def _data(analysis: ExitAnalysis, finished: FinishedStage) -> dict[str, Json]:
    manifest, measured = finished.manifest, finished.measured
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
    cost: MixCost = mix_cost(mix, latency, finished.plain_ms, [spec.macs for spec in manifest.exits])
    return {
        "policy": manifest.policy.name if manifest.policy else None,
        "table": table,
        "cost": {**dataclasses.asdict(cost), "break_even_text": break_even_text(cost)},
        "operating_points": [dataclasses.asdict(point) for point in manifest.operating_points],
        **dataclasses.asdict(analysis),
    }


def _exits_table(data: Mapping[str, Json]) -> Table:
    excluded = bool(data["wrong_exclusions"])
    columns = ("exit", "rows", "accuracy there", "head alone", "MACs", "p50 ms")
    rows = [
        (
            row["name"],
            percent(row["share"]),
            percent(row["accuracy"]),
            percent(row["head_accuracy"]),
            short_count(row["macs"]),
            milliseconds(row["p50_ms"]),
            *((percent(row["wrong_exclusion"]),) if excluded else ()),
        )
        for row in data["table"]
    ]
    return Table((*columns, *(("true class excluded",) if excluded else ())), tuple(rows))


def _shares(counts: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Each row in per cent of its sum."""
    table = np.asarray(counts, dtype=np.float64)
    table = 100 * table / np.maximum(1, table.sum(axis=1, keepdims=True))
    return tuple(tuple(row) for row in table.tolist())


def _per_class(analysis: ExitAnalysis, names: Sequence[str], labels: Sequence[str]) -> Table:
    rows = []
    for label, counts, right in zip(labels, analysis.per_class, analysis.right_per_class, strict=True):
        total = sum(counts)
        cells = (
            f"{percent(n / total)}, {percent(hits / n)} right" if n else "–"
            for n, hits in zip(counts, right, strict=True)
        )
        rows.append((label, *cells, percent(sum(right) / total if total else None)))
    return Table(("class", *names, "all"), tuple(rows), "Share and accuracy of every class at every exit")


def _confusions(analysis: ExitAnalysis, labels: Sequence[str]) -> list[Block]:
    if not analysis.confusions:
        return []
    shown = analysis.confusions[:_MOST_CONFUSIONS]
    rows = tuple((labels[own], labels[answer], str(n), str(right)) for own, answer, n, right in shown)
    more = len(analysis.confusions) - len(shown)
    return [
        Text(
            "Confusion caused by exclusion: rows that end with their true class excluded; the last column is how many "
            "of them the network's own end has right." + (f" {more} more pairs are left out." if more else "")
        ),
        Table(("class", "answer", "rows", "right at the end"), rows),
    ]
