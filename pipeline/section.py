"""What a stage hands to the report: a section of tables, plots and sentences, as data.

The page is drawn from report.json alone: a plot is its numbers, and the report knows how to draw each kind of plot. So
a stage brings its own section without touching the page, and a page can be drawn anew from the JSON at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from .stage import Json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgewright.edge_runtime.bundle.manifest import Manifest

    from .task import Task


@dataclass(frozen=True)
class Text:
    """A paragraph; what stands between backticks is set as code."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Cells are finished text. With a `summary` the table is folded away behind it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Bars:
    """One bar per name, with a text above it."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    texts: tuple[str, ...]
    unit: str
    caption: str
    kind: str = "bars"


@dataclass(frozen=True)
class StackedBars:
    """One lying bar per name, made of parts: ``values[name][part]``."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    unit: str
    caption: str
    kind: str = "stacked_bars"


@dataclass(frozen=True)
class GroupedBars:
    """Bars side by side over the whole numbers from 1: ``values[series][number - 1]``."""

    series: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    axis: str
    unit: str
    caption: str
    kind: str = "grouped_bars"


@dataclass(frozen=True)
class Heatmap:
    """A table as colours; `edges` are the borders of its columns, left out where a column is no interval."""

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    axis: str
    unit: str
    highest: float
    caption: str
    edges: tuple[float, ...] = ()
    kind: str = "heatmap"


Block: TypeAlias = Text | Table | Bars | StackedBars | GroupedBars | Heatmap


@dataclass(frozen=True)
class Section:
    """What the report shows of one stage.

    Attributes:
        title: of the section.
        blocks: from top to bottom; plots that follow each other stand side by side where there is room.
        data: for programs, under ``sections`` of report.json.
        notes: join the report's notes.
        layers: the layers that it can draw in detail; `FinishedStage.layer` chooses one.
    """

    title: str
    blocks: tuple[Block, ...] = ()
    data: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinishedStage:
    """What a section is made from: what the stage left behind, and what became of the chain.

    Attributes:
        step: the id of the stage's row.
        metrics: what the stage reported.
        artifacts: reads its arrays from disk.
        labels: of the classes that the stage saw.
        task: as it is behind the last stage; its test split is for the report alone.
        model: loads the model that ships.
        manifest: of the bundle that ships.
        measured: its row of `edge_runtime.bench`; None if nothing was measured.
        plain_ms: median latency of the step in front of the last; None if nothing was measured.
        layer: which layer the recipe wants drawn in detail; None leaves the choice to the section.
    """

    step: str
    metrics: Mapping[str, Json]
    artifacts: Callable[[], Mapping[str, NDArray[Any]]]
    labels: tuple[str, ...]
    task: Task
    model: Callable[[], nn.Module]
    manifest: Manifest
    measured: Mapping[str, Json] | None = None
    plain_ms: float | None = None
    layer: str | None = None


def percent(value: float | None) -> str:
    """A share as the report writes it."""
    return "–" if value is None else f"{100 * value:.2f} %"


def milliseconds(value: float | None) -> str:
    """A time as the report writes it."""
    return "–" if value is None else f"{value:.3g}"


def short_count(value: float | None) -> str:
    """A large number with a decimal prefix: ``21.3 M``."""
    if value is None:
        return "–"
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "
