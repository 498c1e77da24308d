"""What a stream of rows with known exits costs: expected latency, and how many must leave early for exits to pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.edge_runtime.bundle.typed_json import strict_json
from edgewright.edge_runtime.process.plain_text import printable

from ...errors import InputError

_NEVER = 2.0


@dataclass(frozen=True)
class MixCost:
    """One mix of exits.

    Attributes:
        mix: share of the rows at each exit, the network's end last.
        expected_ms: of a row, None where an exit that is taken has no measured latency.
        plain_ms: the same network without exits, None if not measured.
        break_even: share of the rows that has to leave early, spread over the early exits as in `mix`, for a row to
            take as long as without exits; 2 where they never do, because early rows take as long as deep ones. None
            where something was not measured or no row leaves early.
        expected_macs: of a row.
    """

    mix: tuple[float, ...]
    expected_ms: float | None
    plain_ms: float | None
    break_even: float | None
    expected_macs: float


def mix_cost(
    mix: Sequence[float], latency_ms: Sequence[float | None], plain_ms: float | None, macs: Sequence[float]
) -> MixCost:
    """Costs of a mix.

    Args:
        mix: share of the rows at each exit, the network's end last; sums to 1.
        latency_ms: of a row that leaves there, None where not measured.
        plain_ms: of the same network without exits.
        macs: of a row that leaves there.
    """
    return MixCost(
        tuple(mix),
        expected(mix, latency_ms),
        plain_ms,
        break_even(mix, latency_ms, plain_ms),
        sum(share * value for share, value in zip(mix, macs, strict=True)),
    )


def expected(mix: Sequence[float], latency: Sequence[float | None]) -> float | None:
    """Mean over the mix; None where an exit that is taken has no value."""
    total = 0.0
    for share, value in zip(mix, latency, strict=True):
        if share > 0.0:
            if value is None:
                return None
            total += share * value
    return total


def break_even(mix: Sequence[float], latency: Sequence[float | None], plain: float | None) -> float | None:
    """Share of early rows at which exits cost what they save; see `MixCost.break_even`."""
    early, deepest = sum(mix[:-1]), latency[-1]
    if plain is None or deepest is None or early <= 0.0:
        return None
    before = expected([*(share / early for share in mix[:-1]), 0.0], latency)
    if before is None:
        return None
    if deepest <= plain:
        return 0.0
    return min(_NEVER, (deepest - plain) / (deepest - before)) if deepest > before else _NEVER


def mix_of_report(report: Mapping[str, Any], mix: Sequence[float] | None, table: Mapping[str, Any] | None) -> MixCost:
    """Costs of a mix, with the figures of a report.

    Args:
        report: content of report.json.
        mix: shares or any positive weights, one per exit and one for the network's end; None is the measured mix.
        table: a latency table, microseconds under ``exits``, in place of the report's latencies.

    Raises:
        InputError: no exits, or numbers that do not fit them.
    """
    exits = exits_of_report(report)
    rows = exits["table"]
    shares = [row["share"] for row in rows] if mix is None else list(mix)
    if len(shares) != len(rows) or min(shares) < 0.0 or sum(shares) <= 0.0:
        names = ", ".join(row["name"] for row in rows)
        raise InputError(f"a mix is {len(rows)} numbers of 0 or more, the shares of {names}; given were {shares}")
    latency = [row["p50_ms"] for row in rows]
    if table is not None:
        latency = [value / 1e3 for value in table["exits"]]
        if len(latency) != len(rows):
            raise InputError(f"the latency table has {len(latency)} exits and the report {len(rows)}")
    total = sum(shares)
    # a report of an older version does not say it
    plain = exits.get("cost", {}).get("plain_ms")
    return mix_cost([share / total for share in shares], latency, plain, [row["macs"] for row in rows])


def exits_of_report(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of the exits in the content of report.json, of this version or of the first.

    Raises:
        InputError: it is of a model without exits.
    """
    sections = [s["data"] for s in report.get("sections", ()) if s.get("stage") == "early_exit"]
    exits: Mapping[str, Any] | None = sections[-1] if sections else report.get("exits")
    if not exits:
        raise InputError("the report is of a model without exits: there is no mix to cost")
    return exits


def mix_text(cost: MixCost, names: Sequence[str]) -> str:
    """The costs in words."""
    shares = ", ".join(f"{printable(name)} {share:.1%}" for name, share in zip(names, cost.mix, strict=True))
    lines = [f"mix: {shares}", f"expected MACs of a row: {cost.expected_macs:,.0f}"]
    if cost.expected_ms is None:
        lines.append("expected latency: not known, an exit of this mix was not measured (give --latency-table)")
    else:
        lines.append(f"expected latency: {cost.expected_ms:.3g} ms")
        if cost.plain_ms is not None:
            lines[-1] += f", without exits {cost.plain_ms:.3g} ms (x{cost.expected_ms / cost.plain_ms:.2f})"
    lines.append(break_even_text(cost))
    return "\n".join(lines)


def break_even_text(cost: MixCost) -> str:
    """One sentence on how many rows have to leave early."""
    if cost.break_even is None:
        if not any(cost.mix[:-1]):
            return "break-even: not known, no row of this mix leaves early"
        if cost.plain_ms is None:
            return "break-even: not known, the network without exits was not measured"
        return (
            "break-even: not known, no measured row went to the network's end or to another exit of this mix; "
            "`latency-table` measures them all"
        )
    if cost.break_even > 1.0:
        return "break-even: none, with this spread over the exits they cost more than they save"
    if cost.break_even == 0.0:
        return "break-even: 0 %, the deepest path is no slower than the network without exits"
    return f"break-even: below {cost.break_even:.1%} of the rows leaving early this is slower than no exits"


def numbers_of(text: str) -> list[float]:
    """``0.5,0.3,0.2`` as numbers.

    Raises:
        InputError: it is something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is no list of numbers: write e.g. 0.5,0.3,0.2") from None


def read_report(path: Path) -> dict[str, Any]:
    """The content of report.json; `path` may be the folder of the run.

    Raises:
        InputError: it is not there or no report.
    """
    place = path / "report.json" if path.is_dir() else path
    content = _read_json(place, str(place))
    if not isinstance(content, dict):
        raise InputError(f"{place} holds no JSON object")
    return content


def read_latency_table(path: Path) -> dict[str, Any]:
    """The ``exits``, microseconds per exit, and the ``device`` of a latency table.

    Raises:
        InputError: it is not there or something else.
    """
    what = f"the latency table {path}"
    content = _read_json(path, what)
    if not isinstance(content, dict) or "exits" not in content:
        raise InputError(f'{what} must be {{"exits": [microseconds per exit ...], "device": "..."}}')
    return {"exits": content["exits"], "device": content.get("device", "")}


def _read_json(path: Path, what: str) -> Any:
    try:
        return strict_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is no JSON: {error}") from None
