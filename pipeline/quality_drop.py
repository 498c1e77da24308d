"""How much worse one model is than another on the same rows, in a task's metric, with its interval.

Both are judged on the same samples in the same order, so what makes rows easy or hard cancels out
(`edge_runtime.measure.paired`). "Not more than the noise" means that the interval holds 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.measure.paired import LEVEL, Drop, paired_drop, paired_drop_of, rows_needed

from .metric import Metric, OverRows, Score

_WORK = 1e6  # numbers that a bootstrap looks at, if that leaves it as many choices of rows as it needs
_RESAMPLES = (200, 1000)


def quality_drop(metric: Metric, before: NDArray[Any] | None, after: NDArray[Any] | None) -> Drop | None:
    """The drop of `metric` over rows, in the unit of recipes' tolerances; None where there is no interval to give.

    Args:
        metric: of the task of both.
        before: `Score.each` of the first.
        after: of the second, on the same rows.
    """
    if before is None or after is None or before.shape != after.shape or len(before) == 0:
        return None
    if before.ndim == 1 and _decisions(before) and _decisions(after) and metric.drop(1.0, 0.0) == 1.0:
        return paired_drop(before, after)
    if before.ndim > 1 and not isinstance(metric, OverRows):
        return None

    def value(each: NDArray[Any]) -> float:
        return float(each.mean()) if each.ndim == 1 or not isinstance(metric, OverRows) else metric.value_of(each)

    def drop(chosen: NDArray[np.int64]) -> float:
        first, second = value(before[chosen]), value(after[chosen])
        return metric.drop(first, second) if np.isfinite(first) and np.isfinite(second) else np.nan

    least, most = _RESAMPLES
    try:
        return paired_drop_of(drop, len(before), resamples=int(min(most, max(least, _WORK // before.size))))
    except ValueError:  # a metric that has no finite value on most choices of rows
        return None


def measured_drop(metric: Metric, before: Score, after: Score) -> str:
    """For messages about a floor: `` (drop ...)`` of two scores on one split, see `drop_text`; empty without one."""
    drop = quality_drop(metric, before.each, after.each)
    return "" if drop is None else f" (drop {drop_text(drop)})"


def drop_text(drop: Drop) -> str:
    """``0.4 points [-0.1, 0.9], n = 300: not more than the noise``; in points where rows are right or wrong."""
    share = drop.p_value is not None
    value, low, high = (f"{100 * x:.2f}" if share else f"{x:.3g}" for x in (drop.value, drop.low, drop.high))
    verdict = {"worse": "worse", "better": "better"}.get(drop.verdict, "not more than the noise")
    return f"{value}{' points' if share else ''} [{low}, {high}], n = {drop.rows}: {verdict}"


def no_promise(drop: Drop, tolerance: float) -> str | None:
    """Why rows that kept `tolerance` cannot promise that it is kept elsewhere; None if they can.

    Args:
        drop: within the tolerance.
        tolerance: in the unit of the drop.
    """
    if drop.high <= tolerance:
        return None
    text = f"the {LEVEL:.0%} interval of the drop reaches {drop.high:.3g}, past {tolerance:g}"
    if drop.discordant is None or tolerance <= 0:
        return f"{text}: more rows would narrow it"
    # a run without any discordant row says that they are rare, not that there are none
    share = max(drop.discordant, 1) / drop.rows
    return f"{text}: {drop.rows} rows cannot promise that, about {rows_needed(tolerance, discordance=share):,} could"


def _decisions(each: NDArray[Any]) -> bool:
    return bool(np.isin(each, (0, 1)).all())
