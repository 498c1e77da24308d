"""What every benchmark script shares: its arguments, its table and its JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


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
        content = {"benchmark": benchmark, "figures": {name: asdict(f) for name, f in figures.items()}}
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
