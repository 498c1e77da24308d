from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.edge_runtime.measure import statistics


def _exact_discard_count(n: int, percentile: float) -> int:
    """The definition, summed term by term."""
    q, total, best = 1 - percentile / 100, 0.0, 0
    for t in range(n + 1):
        total += math.comb(n, t) * q**t * (1 - q) ** (n - t)
        if total > 0.01:
            return best
        best = t
    return best


@pytest.mark.parametrize(("percentile", "needed"), [(50, 11), (90, 64), (95, 130), (99, 662)])
def test_samples_needed(percentile: float, needed: int) -> None:
    assert statistics.samples_needed(percentile) == needed
    assert statistics.discard_count(needed, percentile) == 1
    assert statistics.discard_count(needed - 1, percentile) == 0


@pytest.mark.parametrize(
    ("percentile", "t", "needed"),
    [(90, 2, 81), (90, 3, 97), (90, 5, 127), (90, 10, 197), (99, 2, 838), (99, 3, 1001), (99, 5, 1307)],
)
def test_golden_discard_counts(percentile: float, t: int, needed: int) -> None:
    assert statistics.samples_needed(percentile, t) == needed


@pytest.mark.parametrize("n", [0, 1, 11, 64, 200, 700])
@pytest.mark.parametrize("percentile", [50, 75, 90, 99])
def test_discard_count_is_the_exact_sum(n: int, percentile: float) -> None:
    assert statistics.discard_count(n, percentile) == _exact_discard_count(n, percentile)


def test_a_million_samples_discard_nearly_a_tenth() -> None:
    # LoadGen's search bound of 1024 made this collapse on long runs (mlcommons/inference#1083).
    assert 0.99e5 < statistics.discard_count(10**6, 90) < 1e5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.sampled_from([50, 90, 95, 99]))
def test_more_samples_never_discard_fewer(n: int, percentile: float) -> None:
    assert statistics.discard_count(n + 1, percentile) >= statistics.discard_count(n, percentile)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e6), st.integers(64, 500))
def test_a_constant_is_its_own_bound(value: float, n: int) -> None:
    bound = statistics.percentile_bound(np.full(n, value), 90)
    assert bound.bound == value and bound.value == pytest.approx(value)


@pytest.mark.parametrize("draw", ["exponential", "standard_cauchy", "lognormal", "random"])
def test_the_bound_is_above_the_true_quantile_in_99_percent_of_trials(draw: str) -> None:
    rng = np.random.default_rng(4)
    truth = np.quantile(getattr(np.random.default_rng(5), draw)(size=2_000_000), 0.9)
    misses = sum(statistics.percentile_bound(getattr(rng, draw)(size=150), 90).bound < truth for _ in range(1000))
    assert misses <= 10


def test_a_percentile_that_the_count_cannot_carry_is_refused() -> None:
    bound = statistics.percentile_bound(np.arange(100.0), 99)
    assert bound.value is None and bound.bound is None
    assert bound.reason == "100 samples cannot carry p99: 662 are needed"


@pytest.mark.parametrize(("percentile", "confidence"), [(0, 0.99), (100, 0.99), (90, 0.4), (90, 1.0)])
def test_impossible_questions(percentile: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="between"):
        statistics.percentile_bound(np.arange(9.0), percentile, confidence)


@pytest.mark.parametrize("n", [50, 51])
def test_median_interval_is_the_bootstrap(n: int) -> None:
    samples = np.random.default_rng(0).exponential(size=n)
    rng = np.random.default_rng(1)
    medians = np.median(rng.choice(samples, (20_000, n)), axis=1)
    low, high = statistics.median_interval(samples)
    assert low == pytest.approx(np.quantile(medians, 0.025), rel=0.05)
    assert high == pytest.approx(np.quantile(medians, 0.975), rel=0.05)
    assert statistics.median_interval(samples) == (low, high)


def test_median_interval_covers_the_median() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        low, high = statistics.median_interval(rng.normal(size=40))
        hits += low <= 0 <= high
    assert hits >= 0.92 * 400


def test_spread() -> None:
    samples = np.array([1.0, 2, 3, 4, 100])
    assert statistics.mad(samples) == 1
    assert statistics.cov(samples) == pytest.approx(samples.std(ddof=1) / 22)
    assert statistics.cov(samples[:1]) == 0
    assert statistics.lag1_autocorrelation(np.ones(50)) == 0
    assert statistics.lag1_autocorrelation(np.arange(500.0)) > 0.95


def _latencies(n: int = 900, seed: int = 0) -> np.ndarray:
    return 5.0 + 0.1 * np.random.default_rng(seed).normal(size=n)


def test_a_steady_run_is_stable() -> None:
    verdicts = [statistics.stability(_latencies(seed=seed)).verdict for seed in range(100)]
    assert verdicts.count("stable") >= 95


def test_a_machine_that_slows_down_is_drifting() -> None:
    result = statistics.stability(_latencies() * np.linspace(1, 1.2, 900))
    assert result.verdict == "drifting" and result.drift == pytest.approx(0.13, abs=0.03)
    assert "the last third is +12" in result.reasons[0]


def test_spikes_are_noisy() -> None:
    samples = _latencies()
    samples[::90] = 70
    result = statistics.stability(samples)
    assert result.verdict == "noisy" and "coefficient of variation" in result.reasons[0]


def test_periodic_disturbance_is_noisy() -> None:
    samples = 5 + 0.2 * np.sin(np.arange(900) / 8) + 0.02 * _latencies()
    result = statistics.stability(samples)
    assert result.verdict == "noisy" and "neighbouring" in result.reasons[0]


@pytest.mark.parametrize("wave", ["sine", "alternating", "steps"])
def test_a_disturbance_too_small_to_matter_is_no_noise(wave: str) -> None:
    at = np.arange(900)
    shape = {"sine": np.sin(at / 8), "alternating": (-1.0) ** at, "steps": (at // 30) % 2 * 2.0 - 1}[wave]
    rest = np.random.default_rng(0).normal(size=900) * 2e-4
    for amplitude, verdict in ((6e-4, "stable"), (0.005, "stable"), (0.03, "noisy")):
        result = statistics.stability(5 * (1 + amplitude * shape + rest))
        assert result.verdict == verdict and abs(result.lag1_autocorrelation or 0) > 0.3, (amplitude, result)
        assert result.amplitude == pytest.approx(amplitude, rel=0.5)
    assert "amplitude of" in result.reasons[0]


def test_exits_are_not_noise() -> None:
    exits = np.random.default_rng(3).integers(0, 3, 900)
    samples = _latencies() * (1 + exits)
    assert statistics.stability(samples).verdict == "noisy"
    assert statistics.stability(samples, exits).verdict == "stable"


def test_too_few_samples_get_no_good_verdict() -> None:
    result = statistics.stability(_latencies(20))
    assert result.verdict == "noisy" and "30 are needed" in result.reasons[0] and result.drift is None
