"""Windows of a time series: what they hold, and that no split sees a row of another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.time_windows import stretches_in_time, windows


def test_a_window_is_followed_by_its_horizon() -> None:
    rows = np.arange(10, dtype=np.float32)
    inputs, targets = windows(np.stack([rows, -rows], 1), rows[:, None], range(2, 8), window=3, horizon=2)
    np.testing.assert_array_equal(inputs, [[[2, 3, 4], [-2, -3, -4]], [[3, 4, 5], [-3, -4, -5]]])
    np.testing.assert_array_equal(targets, [[[5, 6]], [[6, 7]]])
    assert inputs.dtype == targets.dtype == np.float32


def test_splits_follow_each_other_in_time_and_share_no_row() -> None:
    rows = np.arange(200, dtype=np.float32)[:, None]
    seen: list[set[float]] = []
    for stretch in stretches_in_time(200).values():
        inputs, targets = windows(rows, rows, stretch, window=6, horizon=3)
        seen.append({*inputs.ravel().tolist(), *targets.ravel().tolist()})
    assert [len(rows_of) for rows_of in seen] == [120, 20, 20, 40]
    for earlier, later in itertools.pairwise(seen):
        assert max(earlier) < min(later)


def test_with_a_stride_no_row_is_predicted_twice() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]
    _, targets = windows(rows, rows, range(12), window=4, horizon=3, stride=3)
    np.testing.assert_array_equal(targets, [[[4, 5, 6]], [[7, 8, 9]]])


def test_too_few_rows_are_refused_with_the_number_that_is_needed() -> None:
    rows = np.zeros((20, 1), np.float32)
    with pytest.raises(DataError, match=r"rows 12 to 13 of the series are 2, .* takes 5"):
        windows(rows, rows, stretches_in_time(20)["calibration"], window=3, horizon=2)


@pytest.mark.parametrize("shares", [{}, {"train": 0.0}, {"train": float("nan")}, {"training": 1.0}])
def test_shares_that_make_no_sense_are_refused(shares: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match="give positive shares"):
        stretches_in_time(20, shares)


def test_a_window_of_no_rows_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1 row"):
        windows(np.zeros((9, 1), np.float32), np.zeros((9, 1), np.float32), range(9), window=0, horizon=1)
