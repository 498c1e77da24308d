from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.edge_runtime import compare

NAN, INF = np.nan, np.inf


def _f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_figures() -> None:
    result = compare(_f(1, 2, 3.5, -4), _f(1, 2.5, 3, -4), abs_tol=0.1, rel_tol=0.15)
    assert not result.passed and result.outside == 1 and result.fraction_outside == 0.25
    assert result.max_abs == 0.5 and result.max_rel == pytest.approx(0.2)
    assert result.l1 == 0.25 and result.worst_index == (1,)  # 0.5 against 0.475 misses, 0.5 against 0.55 not
    assert result.cosine == pytest.approx(0.995, abs=0.01)


def test_the_tolerance_is_inclusive_and_relative_to_what_was_wanted() -> None:
    assert compare(_f(1.5), _f(1), abs_tol=0.5).passed
    assert compare(_f(1), _f(2), rel_tol=0.5).passed
    assert not compare(_f(2), _f(1), rel_tol=0.5).passed


@pytest.mark.parametrize(
    ("got", "want", "passes"),
    [
        (NAN, 1, False),
        (1, NAN, False),
        (NAN, NAN, False),
        (INF, INF, True),
        (-INF, -INF, True),
        (INF, -INF, False),
        (INF, 1, False),
        (1, INF, False),
        (INF, NAN, False),
    ],
)
def test_non_finite_values(got: float, want: float, passes: bool) -> None:
    result = compare(_f(0, got), _f(0, want), abs_tol=1e9, rel_tol=1e9)
    assert result.passed is passes
    assert passes or result.worst_index == (1,)
    json.dumps(result.to_dict(), allow_nan=False)


def test_nan_on_both_sides_is_said_and_can_be_accepted() -> None:
    result = compare(_f(NAN, 1), _f(NAN, 1))
    assert not result.passed and result.nan_both == 1 and "1 at the same place" in result.text()
    assert compare(_f(NAN, 1), _f(NAN, 1), nan_equal=True).passed


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (np.ones((2, 1)), np.ones(2), "shape [2, 1], wanted [2]"),
        (np.ones(1), np.ones(5), "shape [1], wanted [5]"),
        (np.ones(2, np.float32), np.ones(2), "dtype float32, wanted float64"),
        (np.ones(0), np.ones(0), "empty"),
        (np.array(["a"]), np.array(["a"]), "cannot be compared"),
    ],
)
def test_incomparable_arrays_are_an_error_and_not_broadcast(got, want, message: str) -> None:
    result = compare(got, want, abs_tol=1)
    assert not result.passed and result.error is not None
    assert message in result.text()


def test_integers_are_exact_where_float64_is_not() -> None:
    big = 2**53
    assert not compare(np.array([big + 1]), np.array([big])).passed
    assert compare(np.array([True, False]), np.array([True, False])).passed
    assert compare(np.array(3), np.array(3)).worst_index == ()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.floats(0, 1e6),
)
def test_every_pair_of_arrays_gives_finite_figures(a: list[float], b: list[float], tolerance: float) -> None:
    n = min(len(a), len(b))
    result = compare(_f(*a[:n]), _f(*b[:n]), abs_tol=tolerance)
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.passed == (result.outside == 0)
    with np.errstate(invalid="ignore"):
        close = np.abs(_f(*a[:n]).astype(float) - _f(*b[:n]).astype(float)) <= tolerance
    assert result.passed == bool((close | (_f(*a[:n]) == _f(*b[:n]))).all())
