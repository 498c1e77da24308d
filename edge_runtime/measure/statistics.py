"""Statistics for latencies: bounds that hold for any distribution, and verdicts that say why.

The bound on a percentile is LoadGen's early-stopping estimate, computed from the exact binomial distribution.
With F(t) = P[Binomial(n, 1 - p) <= t], take the largest t with F(t) <= 1 - c and report the t-th largest
sample: with confidence c the p-quantile is not above it, whatever the distribution, if the samples are
exchangeable. Whether they are is what `stability` looks at.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.99
"""Confidence of percentile bounds."""

DRIFT_LIMIT = 0.03
"""First and last third of a run may differ by this share of the median before it counts as drift."""
NOISE_LIMIT = 0.10
"""Coefficient of variation above which a run counts as noisy."""
AUTOCORRELATION_LIMIT = 0.3
AMPLITUDE_LIMIT = 0.01
"""What neighbouring samples share must also reach this share of the median before it counts: `paired_ratio` calls no
smaller difference faster or slower either."""
MIN_SAMPLES_FOR_VERDICT = 30

_SIGMAS = 3.0  # a drift or a correlation must also be this many standard errors away from chance
_RESAMPLES = 4000


@dataclass(frozen=True)
class Bound:
    """A percentile with its upper confidence bound, or the reason why the samples cannot carry one."""

    percentile: float
    value: float | None
    """the sample percentile, in the samples' unit."""
    bound: float | None
    """with `confidence`, the true percentile is not above this."""
    reason: str | None
    n: int
    n_needed: int
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Stability:
    """Whether a run can be quoted: ``stable``, ``noisy`` or ``drifting``, with the evidence."""

    verdict: str
    reasons: tuple[str, ...]
    n: int
    drift: float | None
    """median of the last third over that of the first, minus 1."""
    drift_sigmas: float | None
    """Mann-Whitney z of the two thirds."""
    cov: float | None
    """standard deviation over mean; within groups if groups were given."""
    lag1_autocorrelation: float | None
    """of ranks, so that a pair of spikes does not make it."""
    amplitude: float | None = None
    """of what neighbouring samples share, as a wave around the median and a share of it; outliers cut."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {**asdict(self), "reasons": list(self.reasons)}


def discard_count(n: int, percentile: float, confidence: float = CONFIDENCE) -> int:
    """The largest t with P[Binomial(n, 1 - percentile/100) <= t] <= 1 - confidence; 0 if there is none.

    Args:
        n: number of samples.
        percentile: between 0 and 100, both excluded.
        confidence: at least 0.5 and below 1.
    """
    tail = _tail(percentile, confidence)
    if n <= 0:
        return 0
    # F(mean) is about one half, so t lies below the mean and the sum may stop there.
    top = min(n, math.ceil(n * tail) + 1)
    k = np.arange(top, dtype=np.float64)
    steps = np.log((n - k) / (k + 1)) + math.log(tail / (1 - tail))
    log_pmf = n * math.log1p(-tail) + np.concatenate(([0.0], np.cumsum(steps)))
    cdf = np.cumsum(np.exp(log_pmf))
    return max(int(np.searchsorted(cdf, 1 - confidence, side="right")) - 1, 0)


def samples_needed(percentile: float, t: int = 1, confidence: float = CONFIDENCE) -> int:
    """The smallest number of samples with which `discard_count` reaches `t`: 64 for p90, 662 for p99."""
    low, high = 0, 2
    while discard_count(high, percentile, confidence) < t:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if discard_count(middle, percentile, confidence) < t:
            low = middle
        else:
            high = middle
    return high


def percentile_bound(samples: NDArray[Any], percentile: float, confidence: float = CONFIDENCE) -> Bound:
    """A percentile and its upper confidence bound, or the number of samples that it would take.

    Args:
        samples: [N] numbers, any order.
        percentile: between 0 and 100, both excluded.
        confidence: of the bound.
    """
    samples = np.asarray(samples)
    n, needed = samples.size, samples_needed(percentile, 1, confidence)
    t = discard_count(n, percentile, confidence)
    if t < 1:
        reason = f"{n} samples cannot carry p{percentile:g}: {needed} are needed"
        return Bound(percentile, None, None, reason, n, needed, confidence)
    value = float(np.percentile(samples, percentile))
    bound = float(np.partition(samples, n - t)[n - t])
    return Bound(percentile, value, bound, None, n, needed, confidence)


def median_interval(samples: NDArray[Any], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the median.

    The medians of resamples are drawn directly: a resample is n uniform indices into the sorted samples, and
    the m-th smallest of n uniforms is Beta(m, n - m + 1). Exact, and as fast for 10^6 samples as for 10.

    Args:
        samples: [N] numbers, N at least 1.
        seed: of the resampling; the same seed gives the same interval.
        level: share of resampled medians inside the interval.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    n = ordered.size
    if n == 0:
        raise ValueError("a median needs at least one sample")
    rng = np.random.default_rng(seed)
    lower_rank = (n + 1) // 2
    lower = rng.beta(lower_rank, n - lower_rank + 1, _RESAMPLES)
    upper = lower if n % 2 else lower + (1 - lower) * rng.beta(1, n - lower_rank, _RESAMPLES)
    ranks = [np.minimum((u * n).astype(np.int64), n - 1) for u in (lower, upper)]
    medians = (ordered[ranks[0]] + ordered[ranks[1]]) / 2
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mad(samples: NDArray[Any]) -> float:
    """Median absolute deviation from the median, in the samples' unit."""
    samples = np.asarray(samples, np.float64)
    return float(np.median(np.abs(samples - np.median(samples))))


def cov(samples: NDArray[Any]) -> float:
    """Coefficient of variation: standard deviation over mean."""
    samples = np.asarray(samples, np.float64)
    return float(samples.std(ddof=1) / samples.mean()) if samples.size > 1 else 0.0


def lag1_autocorrelation(samples: NDArray[Any]) -> float:
    """Correlation of the ranks of neighbouring samples; 0 for a constant series."""
    ranks = _ranks(np.asarray(samples, np.float64))
    centred = ranks - ranks.mean()
    power = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / power if power > 0 else 0.0


def stability(samples: NDArray[Any], groups: NDArray[Any] | None = None) -> Stability:
    """Looks for drift, noise and periodic disturbance in samples in the order they were taken.

    Args:
        samples: [N] latencies, any unit.
        groups: [N] group of each sample, e.g. the exit it left by. Each sample is then judged against the
            median of its own group, so that two fast and slow exits do not look like noise.

    Returns:
        ``drifting`` before ``noisy`` before ``stable``; fewer than 30 samples are ``noisy``.
    """
    samples = np.asarray(samples, np.float64)
    n = samples.size
    if n < MIN_SAMPLES_FOR_VERDICT:
        few = f"{n} samples are too few for a verdict, {MIN_SAMPLES_FOR_VERDICT} are needed"
        return Stability("noisy", (few,), n, None, None, None, None)
    relative = samples / _group_medians(samples, groups)
    third = n // 3
    first, last = relative[:third], relative[-third:]
    drift = float(np.median(last) / np.median(first) - 1)
    drift_sigmas = _mann_whitney_z(first, last)
    spread, correlation, amplitude = cov(relative), lag1_autocorrelation(relative), _shared_amplitude(relative)
    drifting, noisy = [], []
    if abs(drift) > DRIFT_LIMIT and abs(drift_sigmas) > _SIGMAS:
        drifting.append(f"the last third is {drift:+.1%} against the first ({abs(drift_sigmas):.1f} sigma)")
    if spread > NOISE_LIMIT:
        noisy.append(f"the coefficient of variation is {spread:.1%}, above {NOISE_LIMIT:.0%}")
    if abs(correlation) > max(AUTOCORRELATION_LIMIT, _SIGMAS / math.sqrt(n)) and amplitude > AMPLITUDE_LIMIT:
        noisy.append(
            f"neighbouring samples correlate ({correlation:+.2f}), with an amplitude of {amplitude:.1%}: something "
            "periodic disturbs the run"
        )
    verdict = "drifting" if drifting else "noisy" if noisy else "stable"
    return Stability(verdict, tuple(drifting + noisy), n, drift, drift_sigmas, spread, correlation, amplitude)


def _tail(percentile: float, confidence: float) -> float:
    if not 0 < percentile < 100:
        raise ValueError(f"a percentile lies between 0 and 100, not {percentile}")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"a confidence lies between 0.5 and 1, not {confidence}")
    return 1 - percentile / 100


def _ranks(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties share their mean rank."""
    _, inverse, counts = np.unique(samples, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = (ends - (counts - 1) / 2).astype(np.float64)
    return means[inverse]


def _shared_amplitude(relative: NDArray[np.float64]) -> float:
    """Amplitude of the sine whose neighbouring samples vary together as much as these do."""
    low, high = np.quantile(relative, [0.01, 0.99])
    centred = np.clip(relative, low, high)
    centred = centred - centred.mean()
    return math.sqrt(2 * abs(float(centred[:-1] @ centred[1:])) / centred.size)


def _mann_whitney_z(first: NDArray[np.float64], last: NDArray[np.float64]) -> float:
    """Standard score of the rank sum of `last`, ties corrected; positive when `last` is larger."""
    both = np.concatenate([first, last])
    n1, n2, n = first.size, last.size, both.size
    _, counts = np.unique(both, return_counts=True)
    ties = float((counts.astype(np.float64) ** 3 - counts).sum()) / (n * (n - 1))
    variance = n1 * n2 / 12 * (n + 1 - ties)
    if variance <= 0:
        return 0.0
    u = float(_ranks(both)[n1:].sum()) - n2 * (n2 + 1) / 2
    return (u - n1 * n2 / 2) / math.sqrt(variance)


def _group_medians(samples: NDArray[np.float64], groups: NDArray[Any] | None) -> NDArray[np.float64]:
    if groups is None:
        return np.full(samples.size, np.median(samples))
    medians = np.empty(samples.size)
    for group in np.unique(groups):
        members = np.asarray(groups) == group
        medians[members] = np.median(samples[members])
    return medians
