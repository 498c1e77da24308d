"""What settings of the thresholds do to rows, counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Counts(NamedTuple):
    """Of T settings: how many rows do what.

    Attributes:
        hits: right rows of every class, int64 [T, C].
        leaving: rows that leave at every exit and at the network's end, int64 [T, K + 1].
        lost: rows that end with their true class excluded, int64 [T].
        flips: rows that are right, and would be wrong if none left early, or the reverse, int64 [T].
    """

    hits: NDArray[np.int64]
    leaving: NDArray[np.int64]
    lost: NDArray[np.int64]
    flips: NDArray[np.int64]
