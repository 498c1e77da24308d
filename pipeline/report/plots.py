"""The report's plots, each an inline SVG string; matplotlib's own fonts, nothing fetched."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
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


def draw(block: Mapping[str, Any]) -> str:
    """A plot of a section; `block` is one of the plots of `pipeline.section` as plain data."""
    return KINDS[block["kind"]](block)


def _bars(block: Mapping[str, Any]) -> str:
    figure, (axis,) = _figure(4.6, 3.2)
    places = range(len(block["names"]))
    bars = axis.bar(places, block["values"], color=_COLORS[0], width=0.65)
    for bar, text in zip(bars, block["texts"], strict=True):
        axis.annotate(text, (bar.get_x() + bar.get_width() / 2, bar.get_height()), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(places, [_short(n, 26) for n in block["names"]], fontsize=8, rotation=15, ha="right")
    axis.set_ylabel(block["unit"])
    axis.margins(y=0.15)
    return _svg(figure)


def _stacked_bars(block: Mapping[str, Any]) -> str:
    names, table = block["names"], np.asarray(block["values"], dtype=np.float64)
    figure, (axis,) = _figure(4.9, max(2.6, 0.26 * len(names) + 1.0))
    left = np.zeros(len(names))
    for k, part in enumerate(block["parts"]):
        axis.barh(range(len(names)), table[:, k], left=left, color=_COLORS[k % len(_COLORS)], label=_short(part))
        left += table[:, k]
    axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(float(left.max(initial=0.0)), 1e-9))
    axis.set_xlabel(block["unit"])
    axis.legend(
        fontsize=7, frameon=False, ncols=min(4, len(block["parts"])), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return _svg(figure)


def _grouped_bars(block: Mapping[str, Any]) -> str:
    table = np.asarray(block["values"], dtype=np.float64)
    figure, (axis,) = _figure(9.5, 3.0)
    numbers = np.arange(1, table.shape[1] + 1)
    width = 0.8 / len(table)
    for k, (name, row) in enumerate(zip(block["series"], table, strict=True)):
        shift = (k - (len(table) - 1) / 2) * width
        axis.bar(numbers + shift, row, width, color=_COLORS[k % len(_COLORS)], label=_short(name, 28))
    # what hardly ever happens would press the rest together
    last = int(np.max(np.nonzero(table.max(axis=0) > 0.0005 * max(table.max(), 1e-9))[0], initial=0)) + 1
    axis.set_xlim(0.4, max(3, last) + 0.6)
    axis.set_xticks(numbers[: max(3, last)])
    axis.set_xlabel(block["axis"])
    axis.set_ylabel(block["unit"])
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _heatmap(block: Mapping[str, Any]) -> str:
    table, names = np.asarray(block["values"], dtype=np.float64), block["names"]
    figure, (axis,) = _figure(9.5, min(9.0, max(2.4, 0.18 * len(names) + 1.2)))
    axis.grid(False)
    edges = np.asarray(block["edges"]) if block["edges"] else np.arange(table.shape[1] + 1)
    mesh = axis.pcolormesh(
        edges, np.arange(len(names) + 1), table, cmap="Blues" if block["edges"] else "viridis", vmin=0,
        vmax=block["highest"],
    )  # fmt: skip
    places = np.arange(0, len(names), -(-len(names) // 64))
    axis.set_yticks(places + 0.5, [_short(names[i], 34) for i in places], fontsize=6 if len(places) > 24 else 8)
    axis.invert_yaxis()
    axis.set_xlabel(block["axis"])
    figure.colorbar(mesh, ax=axis, label=block["unit"])
    return _svg(figure)


KINDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "bars": _bars,
    "stacked_bars": _stacked_bars,
    "grouped_bars": _grouped_bars,
    "heatmap": _heatmap,
}
"""How each kind of plot of a section is drawn."""
WIDE = ("grouped_bars", "heatmap")
"""Kinds that take the page's whole width."""


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[-most + 1 :]
