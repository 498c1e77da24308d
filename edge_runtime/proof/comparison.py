"""Comparing two arrays, in a way that cannot pass by accident.

Two arrays of different shape or dtype are an error and never broadcast, two empty arrays prove nothing, and
NaN never passes against a number. Used by `verify` on the device and by the export's parity check.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. All figures but the counts are over pairs where both values are finite."""

    passed: bool
    error: str | None
    """Why the arrays could not be compared at all; the figures are zero then."""
    elements: int = 0
    outside: int = 0
    """elements that fail, non-finite ones included."""
    fraction_outside: float = 0.0
    """trtexec's l0."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """largest ``|got - want| / |want|`` where want is not zero."""
    l1: float = 0.0
    """mean ``|got - want|``."""
    cosine: float = 1.0
    worst_index: tuple[int, ...] | None = None
    """the element that misses its tolerance by most, or comes closest to it."""
    worst_got: str = ""
    worst_want: str = ""
    nan_got: int = 0
    nan_want: int = 0
    nan_both: int = 0
    infinite_mismatches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report; every number is finite."""
        return asdict(self)

    def text(self) -> str:
        """One line: how far, how many, where."""
        if self.error is not None:
            return self.error
        parts = [f"max |diff| {self.max_abs:.3g}, {self.outside} of {self.elements} elements outside"]
        if self.nan_got or self.nan_want:
            parts.append(f"NaN: {self.nan_got} got, {self.nan_want} wanted, {self.nan_both} at the same place")
        if self.infinite_mismatches:
            parts.append(f"{self.infinite_mismatches} infinities differ")
        if self.outside and self.worst_index is not None:
            parts.append(f"worst at {list(self.worst_index)}: got {self.worst_got}, wanted {self.worst_want}")
        return "; ".join(parts)


def compare(
    got: NDArray[Any],
    want: NDArray[Any],
    *,
    abs_tol: float = 0.0,
    rel_tol: float = 0.0,
    nan_equal: bool = False,
) -> Comparison:
    """Compares element by element: passes where ``|got - want| <= abs_tol + rel_tol * |want|``.

    An infinity equals only the infinity of the same sign. NaN against NaN fails as well, and is counted in
    `nan_both`, unless `nan_equal`. Integers with both tolerances zero are compared exactly.

    Args:
        got: what was computed, any shape, a real dtype.
        want: what was expected; same shape and dtype.
        abs_tol: absolute tolerance, at least 0.
        rel_tol: tolerance relative to `want`, at least 0.
        nan_equal: accept NaN where NaN is expected.

    Returns:
        The result; a shape or dtype that differs is its `error`, not an exception.
    """
    got, want = np.asarray(got), np.asarray(want)
    if error := _incomparable(got, want):
        return Comparison(passed=False, error=error)
    exact = got.dtype.kind in "biu" and abs_tol == 0 and rel_tol == 0  # float64 cannot hold every int64
    failed = got != want if exact else np.zeros(got.shape, np.bool_)
    a, b = got.astype(np.float64), want.astype(np.float64)
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    finite = np.isfinite(a) & np.isfinite(b)
    infinite = ~finite & ~nan_a & ~nan_b & (a != b)
    difference = np.zeros(a.shape)
    np.subtract(a, b, out=difference, where=finite)
    difference = np.abs(difference)
    with np.errstate(over="ignore"):  # a tolerance beyond all numbers allows all of them
        excess = difference - (abs_tol + rel_tol * np.where(finite, np.abs(b), 0.0))
    failed = failed | (finite & (excess > 0)) | infinite | (nan_a ^ nan_b)
    if not nan_equal:
        failed = failed | (nan_a & nan_b)
    excess = np.where(failed & ~finite, np.inf, np.where(finite, excess, -np.inf))
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), a.shape))
    relative = np.divide(difference, np.abs(b), out=np.zeros(a.shape), where=finite & (b != 0))
    outside = int(failed.sum())
    return Comparison(
        passed=outside == 0,
        error=None,
        elements=got.size,
        outside=outside,
        fraction_outside=outside / got.size,
        max_abs=float(difference.max()),
        max_rel=float(min(relative.max(), np.finfo(np.float64).max)),
        l1=float(difference.sum() / max(int(finite.sum()), 1)),
        cosine=_cosine(a[finite], b[finite]),
        worst_index=worst,
        worst_got=str(got[worst]),
        worst_want=str(want[worst]),
        nan_got=int(nan_a.sum()),
        nan_want=int(nan_b.sum()),
        nan_both=int((nan_a & nan_b).sum()),
        infinite_mismatches=int(infinite.sum()),
    )


def _incomparable(got: NDArray[Any], want: NDArray[Any]) -> str | None:
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, wanted {list(want.shape)}"
    if got.dtype != want.dtype:
        return f"dtype {got.dtype}, wanted {want.dtype}"
    if got.dtype.kind not in "biuf":
        return f"dtype {got.dtype} cannot be compared"
    if got.size == 0:
        return f"both arrays are empty, shape {list(got.shape)}: nothing was compared"
    return None


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Cosine similarity; scaled first, so that squares neither overflow nor vanish."""
    scale_a, scale_b = (float(np.abs(v).max(initial=0.0)) for v in (a, b))
    if scale_a == 0 or scale_b == 0:
        return 1.0 if scale_a == scale_b else 0.0
    a, b = a / scale_a, b / scale_b
    value = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, value))
