"""The class counts that a pruning step left in its artifacts, condensed for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...section import FinishedStage, Heatmap, Section
from ...stage import Json

COUNT, COUNTS = "class_count.", "class_counts."
"""Prefixes of a pruning step's artifacts: per layer the class count [F], and the share of each class's images that need
the filter [C, F]."""
_BINS = 10
_MOST_FILTERS, _MOST_CLASSES = 128, 128


def report(finished: FinishedStage) -> Section | None:
    """Draws the last class counts; None where filters were judged without classes."""
    counts = class_counts(finished.artifacts(), finished.labels, finished.layer)
    if counts is None:
        return None
    layers, chosen = counts["layers"], counts["layer"]
    histograms = np.asarray([layer["histogram"] for layer in layers], dtype=np.float64)
    histograms = 100 * histograms / np.maximum(1, histograms.sum(axis=1, keepdims=True))
    all_layers = Heatmap(
        tuple(f"{layer['path']} ({layer['filters']})" for layer in layers),
        tuple(tuple(row) for row in histograms.tolist()),
        "classes that need a filter",
        "filters of the layer (%)",
        100.0,
        f"How many of the {counts['classes']} classes need a filter, at the last scoring: share of each layer's "
        "filters. What stands left can go.",
        tuple(counts["edges"]),
    )
    which = "The layer" if chosen["asked"] else "The layer whose filters differ most,"
    one_layer = Heatmap(
        tuple(chosen["labels"]),
        tuple(tuple(row) for row in chosen["table"]),
        "filters, by number of classes that need them",
        "images that need it (share)",
        1.0,
        f"{which} `{chosen['path']}`: share of each class's images that need the filter.",
    )
    paths = tuple(layer["path"] for layer in layers)
    return Section(f"Class counts: {finished.step}", (all_layers, one_layer), counts, layers=paths)


def class_counts(arrays: Mapping[str, NDArray[Any]], labels: Sequence[str], layer: str | None = None) -> Json | None:
    """What the report shows of the last scores of a step; None if it has none.

    Args:
        arrays: the artifacts of the step.
        labels: of the classes that were scored.
        layer: to show class by class; None, or one that has no scores: the one whose filters differ most.

    Returns:
        ``{"classes", "edges", "layers": [{"path", "filters", "histogram"}], "layer": {"path", "asked",
        "labels", "table"}}``; `asked` says whether it is the layer that was asked for; `table` has a row per class and
        a column per filter, by rising class count, both thinned out where there are very many.
    """
    counts = {name.removeprefix(COUNT): array for name, array in arrays.items() if name.startswith(COUNT)}
    if not counts:
        return None
    edges = np.linspace(0.0, len(labels), _BINS + 1)
    layers = [
        {"path": path, "filters": len(count), "histogram": _histogram(count, edges)} for path, count in counts.items()
    ]
    chosen = layer if layer in counts else max(counts, key=lambda path: float(counts[path].std()))
    return {
        "classes": len(labels),
        "edges": edges.tolist(),
        "layers": layers,
        "layer": {"asked": chosen == layer, **_table(chosen, counts[chosen], arrays, labels)},
    }


def _histogram(count: NDArray[Any], edges: NDArray[np.float64]) -> list[int]:
    # float32 sums may lie a little above the number of classes
    return [int(n) for n in np.histogram(np.clip(count, edges[0], edges[-1]), edges)[0]]


def _table(
    path: str, count: NDArray[Any], arrays: Mapping[str, NDArray[Any]], labels: Sequence[str]
) -> dict[str, Json]:
    shares = arrays[COUNTS + path]
    columns = _thinned(np.argsort(count, kind="stable"), _MOST_FILTERS)
    rows = _thinned(np.arange(len(labels)), _MOST_CLASSES)
    table = np.round(shares[rows][:, columns].astype(np.float64), 3)
    return {"path": path, "labels": [labels[row] for row in rows], "table": table.tolist()}


def _thinned(indices: NDArray[Any], most: int) -> NDArray[Any]:
    """`indices`, or `most` of them at even distances."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]
