from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.edge_runtime.measure.paired import (
    mcnemar,
    mean_interval,
    paired_drop,
    paired_drop_of,
    paired_error,
    paired_ratio,
    rows_needed,
    standard_errors,
    student_quantile,
)


def _latencies(n: int = 900, seed: int = 0) -> np.ndarray:
    return 5.0 + 0.1 * np.random.default_rng(seed).normal(size=n)


def _right(rng: np.random.Generator, rows: int, lost: float, won: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right or wrong before and after, where a share is lost and a share is won."""
    draw, both = rng.random(rows), rng.random(rows) < 0.8
    before = np.where(draw < lost, True, np.where(draw < lost + won, False, both))
    after = np.where(draw < lost, False, np.where(draw < lost + won, True, both))
    return before, after


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial(lost: int, won: int) -> None:
    n, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_mcnemar_of_many_rows_does_not_underflow() -> None:
    assert 0.0 < mcnemar(2400, 2000) < 1e-8
    assert mcnemar(2000, 2000) == 1.0


@pytest.mark.parametrize(
    ("rows", "lost", "won"), [(100, 0.05, 0.05), (300, 0.04, 0.01), (60, 0.3, 0.1), (1000, 0.01, 0.0)]
)
def test_the_interval_of_an_accuracy_covers_the_true_drop(rows: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    drops = [paired_drop(*_right(rng, rows, lost, won)) for _ in range(600)]
    covered = sum(drop.low <= lost - won <= drop.high for drop in drops)
    assert covered >= 0.93 * len(drops)


def test_equal_networks_are_told_apart_as_seldom_as_the_level_says() -> None:
    rng = np.random.default_rng(1)
    verdicts = [paired_drop(*_right(rng, 400, 0.02, 0.02)).verdict for _ in range(600)]
    assert verdicts.count("inconclusive") >= 0.95 * len(verdicts)


def test_half_of_a_points_loss_is_found_with_rows_enough() -> None:
    rng = np.random.default_rng(2)
    verdicts = [paired_drop(*_right(rng, 20_000, 0.01, 0.005)).verdict for _ in range(50)]
    assert verdicts.count("worse") >= 48


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_the_interval_and_mcnemar_never_disagree(lost: int, won: int, agreed: int) -> None:
    rows = max(1, lost + won + agreed)
    before = np.r_[np.ones(lost), np.zeros(won), np.ones(rows - lost - won)]
    after = np.r_[np.zeros(lost), np.ones(won), np.ones(rows - lost - won)]
    drop = paired_drop(before, after)
    assert drop.p_value == mcnemar(lost, won) and drop.discordant == lost + won
    assert -1.0 <= drop.low <= drop.value <= drop.high <= 1.0
    if drop.p_value > 0.05:
        assert drop.verdict == "inconclusive" and drop.low <= 0.0 <= drop.high
    else:
        assert drop.verdict == ("worse" if lost > won else "better")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.integers(2, 40))
def test_a_drop_turns_around_with_its_sides(seed: int, binary: bool, rows: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.normal(size=(2, rows)) if not binary else rng.integers(0, 2, (2, rows))
    one, other = paired_drop(before, after), paired_drop(after, before)
    assert one.value == pytest.approx(-other.value, abs=1e-12)
    assert one.low == pytest.approx(-other.high, abs=1e-9) and one.high == pytest.approx(-other.low, abs=1e-9)
    turned = {"worse": "better", "better": "worse", "inconclusive": "inconclusive"}
    assert other.verdict == turned[one.verdict]


@pytest.mark.parametrize("rows", [8, 30])
def test_the_interval_of_scores_covers_the_true_drop(rows: int) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        easy = rng.normal(0, 5, rows)  # shared by both sides of a row
        drop = paired_drop(easy + 0.3 + rng.normal(size=rows), easy + rng.normal(size=rows), seed=seed)
        covered += drop.low <= 0.3 <= drop.high
    assert covered >= 0.92 * 200


def test_pairing_sees_what_two_averages_do_not() -> None:
    rng = np.random.default_rng(4)
    easy = rng.normal(0, 5, 200)
    assert paired_drop(easy, easy - 0.2 + 0.1 * rng.normal(size=200)).verdict == "worse"


def _growth(before: NDArray[np.float64], after: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
    return float(np.exp(after[rows].mean()) / np.exp(before[rows].mean()) - 1)


def test_a_metric_that_is_no_mean_covers_its_true_drop() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(100):
        losses = rng.gamma(2.0, 1.0, 150)
        worse = losses + 0.1 + 0.2 * rng.normal(size=150)

        found = paired_drop_of(partial(_growth, losses, worse), 150, seed=seed, resamples=200)
        covered += found.low <= math.exp(0.1) - 1 <= found.high
    assert covered >= 90


def test_choices_of_rows_on_which_a_metric_is_not_defined_are_left_out() -> None:
    def drop(rows: NDArray[np.int64]) -> float:
        return 0.5 if 0 in rows else math.nan

    assert paired_drop_of(drop, 20).value == 0.5
    with pytest.raises(ValueError, match="no finite value"):
        paired_drop_of(lambda rows: math.nan, 20)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706205), (2, 4.302653), (5, 2.570582), (11, 2.200985), (200, 1.971896)]
)
def test_student(degrees: int, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-6)
    assert student_quantile(0.025, degrees) == pytest.approx(-quantile, abs=1e-6)


def test_the_interval_of_three_seeds_covers_their_mean() -> None:
    rng = np.random.default_rng(6)
    found = [mean_interval(rng.normal(1.0, 0.1, 3)) for _ in range(1000)]
    assert 0.93 <= np.mean([interval.low <= 1.0 <= interval.high for interval in found]) <= 0.97


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([0.4]).low == -math.inf and mean_interval([0.4]).value == 0.4


def test_rows_for_a_promise_are_as_many_as_its_standard_errors_ask_for() -> None:
    assert rows_needed(0.005) == 5412
    rows = rows_needed(0.01, 0.9, 0.08)
    assert standard_errors(0.9) * math.sqrt(0.08 / rows) <= 0.01 < standard_errors(0.9) * math.sqrt(0.08 / (rows - 1))
    assert rows_needed(0.01, 0.9, 0.08, power=0.8) > rows
    with pytest.raises(ValueError, match="tolerance"):
        rows_needed(0.0)


def test_the_standard_error_is_that_of_the_differences() -> None:
    before, after = _right(np.random.default_rng(7), 500, 0.1, 0.04)
    change = before.astype(float) - after.astype(float)
    error = paired_error(np.array([np.abs(change).mean()]), np.array([change.mean()]), 500)
    assert float(error[0]) == pytest.approx(change.std() / math.sqrt(500))


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [1.0])])
def test_what_cannot_be_paired_is_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="paired drop"):
        paired_drop(before, after)


def test_a_against_a_is_inconclusive() -> None:
    rng = np.random.default_rng(6)
    verdicts = []
    for seed in range(200):
        mood = rng.lognormal(0, 0.2, 40)  # shared by both sides of a pair
        a, b = (mood * rng.lognormal(0, 0.03, 40) for _ in range(2))
        verdicts.append(paired_ratio(a, b, seed=seed).verdict)
    assert verdicts.count("inconclusive") >= 190


def test_a_shift_of_five_percent_is_found_with_forty_pairs() -> None:
    rng = np.random.default_rng(7)
    slower = faster = 0
    for seed in range(100):
        mood = rng.lognormal(0, 0.2, 40)
        a, b = (mood * rng.lognormal(0, 0.03, 40) for _ in range(2))
        slower += paired_ratio(a, 1.05 * b, seed=seed).verdict == "slower"
        faster += paired_ratio(1.05 * a, b, seed=seed).verdict == "faster"
    assert slower >= 90 and faster >= 90


def test_a_ratio_turns_around_with_its_sides() -> None:
    a, b = _latencies(41), 2 * _latencies(41, seed=1)
    one, other = paired_ratio(a, b), paired_ratio(b, a)
    assert one.value == pytest.approx(1 / other.value) and one.low <= one.value <= one.high
    with pytest.raises(ValueError, match="pairs need"):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([0.0], [1.0])
