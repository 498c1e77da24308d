"""Comparisons of two things that were tried on the same rows, in the same blocks, or with the same seeds.

What both have in common (easy rows, a busy moment, a lucky seed) cancels out of a paired difference and does not cancel
out of two separate averages. Every "more than the noise" of this project is one of the questions below, and means that
the interval leaves the value of "no difference" out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .statistics import median_interval

LEVEL = 0.95
"""Share of repetitions in which a two-sided interval is to hold the truth."""

_RESAMPLES = 4000
_ELEMENTS_PER_CHUNK = 1 << 20  # of [resamples, rows]
_MOST_DEGREES = 2000  # beyond them Student's distribution is the normal one to three digits


@dataclass(frozen=True)
class Interval:
    """A mean and what repetitions say of it.

    Attributes:
        value: the mean.
        low: lower end; minus infinity where one value alone says nothing of the spread.
        high: upper end.
        samples: number of values.
    """

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Drop:
    """How much worse the second of two is on the same rows, with its interval.

    Attributes:
        value: positive where the second is worse, in the unit of the rows' scores.
        low: lower end of the interval.
        high: upper end.
        rows: number of rows.
        level: of the interval.
        verdict: ``worse``, ``better`` or ``inconclusive``; the first two need an interval without 0.
        discordant: rows that one has right and the other wrong; None where rows are not right or wrong.
        p_value: of the exact McNemar test; None where rows are not right or wrong.
    """

    value: float
    low: float
    high: float
    rows: int
    level: float
    verdict: str
    discordant: int | None = None
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """A paired ratio b/a, its 95 % interval, and a verdict: ``faster``, ``slower`` or ``inconclusive``."""

    value: float
    low: float
    high: float
    pairs: int
    noise_floor: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)


def paired_drop(
    before: Sequence[float] | NDArray[Any],
    after: Sequence[float] | NDArray[Any],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Drop:
    """The mean of ``before[i] - after[i]`` over rows, where larger scores are better.

    Rows that are right or wrong (booleans, or numbers that are all 0 or 1) get Tango's score interval, which holds its
    level with few discordant rows too; wherever the exact McNemar test finds nothing, it is widened to hold 0. Other
    scores get a bootstrap over rows.

    Args:
        before: [N] score of every row.
        after: [N] score of the same row of what is compared with it.
        level: of the interval.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths differ, no rows, a score that is not finite, or a `level` outside (0, 1).
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"a paired drop needs two equally long lists of scores, got {first.shape} and {second.shape}")
    _check_level(level)
    first, second = first.astype(np.float64), second.astype(np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a paired drop needs finite scores")
    if np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all():
        lost, won = int((first > second).sum()), int((first < second).sum())
        return _binary_drop(lost, won, first.size, level)
    differences = first - second
    rng = np.random.default_rng(seed)
    size = max(1, _ELEMENTS_PER_CHUNK // differences.size)
    means = [
        differences[rng.integers(differences.size, size=(min(size, _RESAMPLES - done), differences.size))].mean(axis=1)
        for done in range(0, _RESAMPLES, size)
    ]
    return _bootstrapped(float(differences.mean()), np.concatenate(means), differences.size, level)


def paired_drop_of(
    drop: Callable[[NDArray[np.int64]], float],
    rows: int,
    *,
    level: float = LEVEL,
    seed: int = 0,
    resamples: int = 1000,
) -> Drop:
    """The drop of a metric that is no mean over rows: perplexity, balanced accuracy, mean IoU.

    Args:
        drop: how much worse the second is on a choice of rows (int64 [rows], some of them repeated); called once with
            every row and once per resample.
        rows: number of rows.
        level: of the interval.
        seed: of the bootstrap.
        resamples: how many choices of rows are tried. A choice on which the metric is not defined (NaN) is left out.

    Raises:
        ValueError: no rows, a `level` outside (0, 1), or a metric that is not defined on all rows or hardly ever.
    """
    if rows < 1:
        raise ValueError("a paired drop needs at least one row")
    _check_level(level)
    value = float(drop(np.arange(rows, dtype=np.int64)))
    rng = np.random.default_rng(seed)
    found = np.asarray([float(drop(rng.integers(rows, size=rows))) for _ in range(resamples)], np.float64)
    known = found[np.isfinite(found)]
    if not math.isfinite(value) or known.size < max(1, resamples // 2):
        raise ValueError("the metric has no finite value on these rows, or on most choices of them")
    return _bootstrapped(value, known, rows, level)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value of McNemar's test: are rows lost as likely as rows won?

    Args:
        lost: rows right before and wrong after.
        won: rows wrong before and right after.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"numbers of rows are not negative, got {lost} and {won}")
    trials, fewer = lost + won, min(lost, won)
    if lost == won:
        return 1.0
    # in logarithms: 2 ** -trials has no float beyond 1074 rows
    k = np.arange(fewer, dtype=np.float64)
    steps = np.concatenate(([0.0], np.cumsum(np.log((trials - k) / (k + 1)))))
    logs = steps - trials * math.log(2.0)
    return min(1.0, 2.0 * float(np.exp(logs).sum()))


def standard_errors(confidence: float | None) -> float:
    """How many a one-sided `confidence` of a normal variable asks for; 0 for None."""
    return 0.0 if confidence is None else NormalDist().inv_cdf(confidence)


def rows_needed(tolerance: float, confidence: float = 0.95, discordance: float = 0.05, power: float = 0.5) -> int:
    """Rows that can carry the promise "accuracy falls by at most `tolerance`", for something that costs nothing.

    Half a point with 95 % confidence takes 5,412 rows where one row of twenty changes between right and wrong.

    Args:
        tolerance: of the promise, in shares of rows; positive.
        confidence: one-sided, of the promise.
        discordance: share of rows that one has right and the other wrong.
        power: how often the promise is then kept by what truly costs nothing; at 0.5, every other time.

    Raises:
        ValueError: an argument outside its range.
    """
    if not tolerance > 0 or not 0.5 <= confidence < 1 or not 0.5 <= power < 1 or not 0 <= discordance <= 1:
        raise ValueError(
            f"rows for a tolerance of {tolerance}, a confidence of {confidence}, a discordance of {discordance} and a "
            f"power of {power}: give a positive tolerance, confidence and power in [0.5, 1), a discordance in [0, 1]"
        )
    errors = standard_errors(confidence) + standard_errors(power)
    return max(1, math.ceil(discordance * (errors / tolerance) ** 2))


def paired_error(discordance: NDArray[np.float64], drop: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Standard error of a paired difference of accuracies.

    Args:
        discordance: [...] share of rows that one has right and the other wrong.
        drop: [...] the difference itself.
        rows: number of rows.
    """
    error: NDArray[np.float64] = np.sqrt(np.maximum(discordance - drop**2, 0.0) / rows)
    return error


def paired_ratio(
    baseline: Sequence[float] | NDArray[Any],
    other: Sequence[float] | NDArray[Any],
    *,
    noise_floor: float = 0.01,
    seed: int = 0,
) -> Ratio:
    """The median of ``other[i] / baseline[i]`` over pairs that were measured next to each other.

    Args:
        baseline: [P] one figure per block, positive.
        other: [P] the other artefact's figure of the same block.
        noise_floor: differences smaller than this share are never called faster or slower.
        seed: of the bootstrap.

    Returns:
        The ratio; its verdict needs the 95 % interval clear of 1 by the noise floor.

    Raises:
        ValueError: lengths differ, no pairs, or a figure that is not positive.
    """
    a, b = np.asarray(baseline, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0 or not (a > 0).all() or not (b > 0).all():
        raise ValueError(f"pairs need two equally long lists of positive numbers, got {a.shape} and {b.shape}")
    # Logarithms make b/a and a/b give reciprocal answers.
    logs = np.log(b / a)
    low, high = median_interval(logs, seed)
    edge = math.log1p(noise_floor)
    verdict = "slower" if low > edge else "faster" if high < -edge else "inconclusive"
    value = math.exp(float(np.median(logs)))
    return Ratio(value, math.exp(low), math.exp(high), a.size, noise_floor, verdict)


def mean_interval(values: Sequence[float] | NDArray[Any], level: float = LEVEL) -> Interval:
    """Mean over repetitions (seeds, windows of a text) and Student's interval of it.

    For a comparison give the differences, paired by seed.

    Args:
        values: [N], N at least 1.
        level: of the interval.

    Raises:
        ValueError: no values, or a `level` outside (0, 1).
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"a mean needs a list of at least one value, got {numbers.shape}")
    _check_level(level)
    mean, count = float(numbers.mean()), numbers.size
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = student_quantile((1 + level) / 2, count - 1) * float(numbers.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution: 12.706 for 0.975 and 1 degree of freedom.

    Args:
        probability: between 0 and 1, both excluded.
        degrees: of freedom, at least 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"no quantile {probability} of Student's distribution with {degrees} degrees of freedom")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    if degrees > _MOST_DEGREES:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _student_within(high, degrees) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        if _student_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high


def _student_within(t: float, degrees: int) -> float:
    """P[-t < T < t], by the finite sums of whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not {level}")


def _verdict(low: float, high: float) -> str:
    return "worse" if low > 0 else "better" if high < 0 else "inconclusive"


def _binary_drop(lost: int, won: int, rows: int, level: float) -> Drop:
    value, p_value = (lost - won) / rows, mcnemar(lost, won)
    low, high = _score_limit(lost, won, rows, level), -_score_limit(won, lost, rows, level)
    if p_value > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    return Drop(value, low, high, rows, level, _verdict(low, high), lost + won, p_value)


def _score_limit(lost: int, won: int, rows: int, level: float) -> float:
    """Lower limit of Tango's interval (Statistics in Medicine 17, 1998): the least drop that its test still allows."""
    wanted = NormalDist().inv_cdf((1 + level) / 2)
    low, high = -1.0, (lost - won) / rows
    for _ in range(60):
        middle = (low + high) / 2
        # the share of rows won that fits best where the drop is `middle`
        a, c = 2.0 * rows, -won * middle * (1 - middle)
        b = -lost - won + (2 * rows - lost + won) * middle
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = rows * (2 * share + middle * (1 - middle))
        distance = lost - won - rows * middle
        if variance <= 0 or distance > wanted * math.sqrt(variance):
            low = middle
        else:
            high = middle
    return high


def _bootstrapped(value: float, resampled: NDArray[np.float64], rows: int, level: float) -> Drop:
    """Percentile interval, as much wider as Student's is than the normal one: few rows resample too narrowly."""
    if rows > 1:
        factor = student_quantile((1 + level) / 2, rows - 1) * math.sqrt(rows / (rows - 1))
        tail = NormalDist().cdf(-factor)
        low, high = (float(q) for q in np.quantile(resampled, [tail, 1 - tail]))
    else:
        low, high = -math.inf, math.inf
    return Drop(value, low, high, rows, level, _verdict(low, high))
