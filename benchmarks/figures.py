"""What every benchmark script shares: its arguments, its intervals, its table and its JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.measure.paired import mean_interval
from edgewright.edge_runtime.measure.statistics import median_interval


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval; an end that is not finite says that repetitions are too few for one."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float] | NDArray[np.float64]) -> Figure:
    """Mean over seeds or other repetitions; of differences that are paired by seed, if two things are compared."""
    found = mean_interval(values)
    return Figure(found.value, found.low, found.high)


def geometric_mean_of(logs: Sequence[float] | NDArray[np.float64]) -> Figure:
    """``exp`` of the mean of logarithms: of ratios, or of losses of windows of a text."""
    found = mean_interval(logs)
    low, high = (math.exp(end) if end < 700 else math.inf for end in (found.low, found.high))
    return Figure(math.exp(found.value), low, high)


def median_of(values: Sequence[float] | NDArray[np.float64]) -> Figure:
    """Median over blocks that were measured interleaved."""
    return Figure(float(np.median(values)), *median_interval(np.asarray(values)))


def arguments(description: str, more: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """Parses ``--quick``, ``--json FILE``, ``--threads N`` and what `more` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a look in under a minute, not a claim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of ONNX Runtime")
    if more is not None:
        more(parser)
    return parser.parse_args()


def report(benchmark: str, figures: Mapping[str, Figure], target: Path | None) -> None:
    """Prints the figures, and writes them where asked."""
    width = max(len(name) for name in figures)
    for name, figure in figures.items():
        print(f"{name:<{width}}  {figure.value:9.4f}   [{figure.low:.4f}, {figure.high:.4f}]")
    if target is not None:
        plain = {
            name: {key: value if math.isfinite(value) else None for key, value in asdict(figure).items()}
            for name, figure in figures.items()
        }
        content = {"benchmark": benchmark, "figures": plain}
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
