"""The report's plots, each an inline SVG string; matplotlib's own fonts, nothing fetched."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#3b6fb6", "#d1782a", "#3a8f5c", "#9a4f96", "#b8433f", "#6b6f76", "#8c7a3d", "#3f9aa8")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "edgewright"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def tradeoff(steps: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy (without classes: the metric) against MACs and weight bytes, one point per step; controls are hollow."""
    classes = all(s["accuracy"] is not None for s in steps)
    quality = {s["step"]: 100 * s["accuracy"] if classes else s["quality"] for s in steps}
    figure, axes = _figure(9.5, 3.6, 2)
    for axis, key, unit, scale in ((axes[0], "macs", "mean MACs per row (millions)", 1e6),
                                   (axes[1], "unique_weight_bytes", "unique weight bytes (kB)", 1e3)):  # fmt: skip
        line = [s for s in steps if not s.get("control")]
        axis.plot([s[key] / scale for s in line], [quality[s["step"]] for s in line], color="#aab", lw=1, zorder=1)
        for i, s in enumerate(steps):
            color = _COLORS[i % len(_COLORS)]
            face = "none" if s.get("control") else color
            axis.scatter(s[key] / scale, quality[s["step"]], s=46, edgecolor=color, facecolor=face, zorder=2, lw=1.6,
                         label=s["step"])  # fmt: skip
        axis.set_xlabel(unit)
        # of the whole axis: a margin of the data's range would cut points that lie close together far from zero
        axis.set_xlim(0, 1.05 * max(max(s[key] for s in steps) / scale, 1e-9))
        lowest = min(quality.values())
        if classes:
            axis.set_ylim(max(0.0, lowest - 0.5 * (100 - lowest) - 0.5), 100.5)
    axes[0].set_ylabel("test accuracy (%)" if classes else f"test {steps[0]['metric']}")
    axes[1].legend(fontsize=8, frameon=False, loc="best")
    return _svg(figure)


def latencies(samples_ms: Mapping[str, NDArray[np.float64]]) -> str:
    """Distribution of the latency of every measured step: share of runs that took at most so long."""
    figure, (axis,) = _figure(9.5, 3.2)
    for i, (step, values) in enumerate(samples_ms.items()):
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axis.step(ordered, 100 * share, where="post", color=_COLORS[i % len(_COLORS)], label=step, lw=1.5)
    longest = max(float(np.quantile(v, 0.99)) for v in samples_ms.values())
    axis.set_xlim(0, 1.15 * longest)
    axis.set_xlabel("latency of one run (ms)")
    axis.set_ylabel("runs at most so slow (%)")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure)


def exit_histogram(names: Sequence[str], rows: Sequence[int], accuracy: Sequence[float | None]) -> str:
    """Share of the rows that leave at each exit, with their accuracy above the bar."""
    figure, (axis,) = _figure(4.6, 3.2)
    total = max(1, sum(rows))
    shares = [100 * r / total for r in rows]
    bars = axis.bar(range(len(rows)), shares, color=_COLORS[0], width=0.65)
    for bar, value in zip(bars, accuracy, strict=True):
        text = "never" if value is None else f"{100 * value:.1f} % right"
        axis.annotate(text, (bar.get_x() + bar.get_width() / 2, bar.get_height()), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), [_short(n, 26) for n in names], fontsize=8, rotation=15, ha="right")
    axis.set_ylabel("rows leaving there (%)")
    axis.margins(y=0.15)
    return _svg(figure)


def depth_per_class(names: Sequence[str], labels: Sequence[str], per_class: Sequence[Sequence[int]]) -> str:
    """Share of each class's rows that leave at each exit."""
    table = np.asarray(per_class, dtype=np.float64)
    table = 100 * table / np.maximum(1, table.sum(axis=1, keepdims=True))
    figure, (axis,) = _figure(4.9, max(2.6, 0.26 * len(labels) + 1.0))
    left = np.zeros(len(labels))
    for k, name in enumerate(names):
        axis.barh(range(len(labels)), table[:, k], left=left, color=_COLORS[k % len(_COLORS)], label=_short(name))
        left += table[:, k]
    axis.set_yticks(range(len(labels)), [_short(label) for label in labels], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("rows of the class (%), by exit")
    axis.legend(fontsize=7, frameon=False, ncols=min(4, len(names)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure)


def surviving_classes(names: Sequence[str], survivors: Sequence[Sequence[int]]) -> str:
    """How many classes are left after each exit, for the rows that reach it."""
    table = np.asarray(survivors, dtype=np.float64)[:, 1:]
    table = 100 * table / np.maximum(1, table.sum(axis=1, keepdims=True))
    figure, (axis,) = _figure(9.5, 3.0)
    counts = np.arange(1, table.shape[1] + 1)
    width = 0.8 / len(table)
    for k, row in enumerate(table):
        axis.bar(counts + (k - (len(table) - 1) / 2) * width, row, width, color=_COLORS[k % len(_COLORS)],
                 label=f"after {_short(names[k])}")  # fmt: skip
    last = int(np.max(np.nonzero(table.max(axis=0) > 0.05)[0], initial=0)) + 1
    axis.set_xlim(0.4, max(3, last) + 0.6)
    axis.set_xticks(counts[: max(3, last)])
    axis.set_xlabel("classes still possible")
    axis.set_ylabel("rows that reach the exit (%)")
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def class_counts(counts: Mapping[str, Any]) -> str:
    """Histogram of class counts of every layer, a row each: share of its filters by number of classes."""
    layers, edges = counts["layers"], np.asarray(counts["edges"])
    table = np.asarray([layer["histogram"] for layer in layers], dtype=np.float64)
    table = 100 * table / np.maximum(1, table.sum(axis=1, keepdims=True))
    figure, (axis,) = _figure(9.5, max(2.2, 0.21 * len(layers) + 1.2))
    axis.grid(False)
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1), table, cmap="Blues", vmin=0, vmax=100, rasterized=False)
    axis.set_yticks(
        np.arange(len(layers)) + 0.5, [f"{_short(x['path'], 34)} ({x['filters']})" for x in layers], fontsize=7
    )
    axis.invert_yaxis()
    axis.set_xlabel("classes that need a filter")
    figure.colorbar(mesh, ax=axis, label="filters of the layer (%)")
    return _svg(figure)


def class_table(layer: Mapping[str, Any]) -> str:
    """Share of each class's images that need each filter of one layer; filters by rising class count."""
    table, labels = np.asarray(layer["table"]), layer["labels"]
    figure, (axis,) = _figure(9.5, min(9.0, max(2.6, 0.14 * len(labels) + 1.2)))
    axis.grid(False)
    mesh = axis.pcolormesh(table, cmap="viridis", vmin=0, vmax=1)
    every = -(-len(labels) // 64)
    places = np.arange(0, len(labels), every)
    axis.set_yticks(places + 0.5, [_short(labels[i]) for i in places], fontsize=6 if len(places) > 24 else 8)
    axis.invert_yaxis()
    axis.set_xlabel("filters, by number of classes that need them")
    axis.set_ylabel("class")
    figure.colorbar(mesh, ax=axis, label="images that need it (share)")
    return _svg(figure)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[-most + 1 :]
