"""The class counts that a pruning step left in its artifacts, condensed for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stage import Json
from ...store.cache import read_artifacts

COUNT, COUNTS = "class_count.", "class_counts."
"""Prefixes of a pruning step's artifacts: per layer the class count [F], and the share of each class's images that need
the filter [C, F]."""
_BINS = 10
_MOST_FILTERS, _MOST_CLASSES = 128, 128


def class_counts(step: str, checkpoint: Path, labels: Sequence[str], layer: str | None = None) -> Json | None:
    """What the report shows of the last scores of a step; None if it has none.

    Args:
        step: its id.
        checkpoint: its folder.
        labels: of the classes that were scored.
        layer: to show class by class; None, or one that has no scores: the one whose filters differ most.

    Returns:
        ``{"step", "classes", "edges", "layers": [{"path", "filters", "histogram"}], "layer": {"path", "asked",
        "labels", "table"}}``; `asked` says whether it is the layer that was asked for; `table` has a row per class and
        a column per filter, by rising class count, both thinned out where there are very many.
    """
    arrays = read_artifacts(checkpoint)
    counts = {name.removeprefix(COUNT): array for name, array in arrays.items() if name.startswith(COUNT)}
    if not counts:
        return None
    edges = np.linspace(0.0, len(labels), _BINS + 1)
    layers = [
        {"path": path, "filters": len(count), "histogram": _histogram(count, edges)} for path, count in counts.items()
    ]
    chosen = layer if layer in counts else max(counts, key=lambda path: float(counts[path].std()))
    return {
        "step": step,
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
