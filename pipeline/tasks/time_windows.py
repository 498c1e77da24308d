"""Windows of a time series: what was, to predict what comes; splits follow each other in time and share no row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..errors import DataError
from ..task import SPLITS, SplitName

_SHARES: Mapping[SplitName, float] = {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}


def stretches_in_time(rows: int, shares: Mapping[SplitName, float] | None = None) -> dict[SplitName, range]:
    """The rows of a series cut into one stretch for each split: train first, test last.

    Args:
        rows: of the series, in order of time.
        shares: of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2; they may sum to anything.

    Raises:
        DataError: an unknown split, or a share that is not positive and finite.
    """
    given = dict(_SHARES if shares is None else shares)
    for name, share in given.items():
        if name not in SPLITS or not (math.isfinite(share) and share > 0):
            raise DataError(f"fractions {given}: give positive shares of {', '.join(SPLITS)}")
    names = [name for name in SPLITS if name in given]
    ends = np.cumsum([given[name] for name in names])
    if not names:
        raise DataError("fractions are empty: give positive shares of " + ", ".join(SPLITS))
    cuts = [0, *(round(rows * float(end / ends[-1])) for end in ends)]
    return {name: range(cuts[i], cuts[i + 1]) for i, name in enumerate(names)}


def windows(
    past: NDArray[np.float32], future: NDArray[np.float32], stretch: range, window: int, horizon: int, stride: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Windows that lie whole in `stretch`, with what follows each there.

    Args:
        past: columns that the model reads, [rows, C].
        future: columns that it predicts, [rows, D].
        stretch: consecutive rows; those of different splits share none, so neither do their windows.
        window: rows that the model reads.
        horizon: rows after them that it predicts.
        stride: rows from the beginning of one window to the next; from `horizon` on no row is predicted twice.

    Returns:
        Inputs [N, C, window] and targets [N, D, horizon], channels first as convolutions take them.

    Raises:
        DataError: a number is not positive, or the stretch is too short for one window.
    """
    if min(window, horizon, stride) < 1:
        raise DataError(f"window {window}, horizon {horizon} and stride {stride}: give at least 1 row of each")
    count = len(stretch) - window - horizon + 1
    if count < 1:
        raise DataError(
            f"rows {stretch.start} to {stretch.stop - 1} of the series are {len(stretch)}, and a window of {window} "
            f"with a horizon of {horizon} takes {window + horizon}: give more rows or shorter windows"
        )
    read = sliding_window_view(past[stretch.start : stretch.stop - horizon], window, axis=0)[::stride]
    wanted = sliding_window_view(future[stretch.start + window : stretch.stop], horizon, axis=0)[::stride]
    return np.ascontiguousarray(read, np.float32), np.ascontiguousarray(wanted, np.float32)
