"""A time series that is made up, to try recipes for forecasts on: three waves whose sizes wander, and noise."""

from __future__ import annotations

import numpy as np

from ...errors import DataError
from ...task import SPLITS
from ..regression import Regression
from ..time_windows import stretches_in_time, windows


def synthetic_forecast(
    seed: int = 0, rows: int = 3000, window: int = 48, horizon: int = 6, noise: float = 0.1
) -> Regression:
    """The load of the next hours [N, horizon] from two columns of the last ones, load and temperature [N, 2, window].

    A day has 24 rows. That the load follows the temperature three rows later cannot be seen in the load alone.

    Args:
        seed: of the series.
        rows: of it; splits follow each other in time.
        window: rows that the model reads.
        horizon: rows that it predicts.
        noise: standard deviation of what cannot be predicted, where the daily wave has about 1.

    Raises:
        DataError: too few rows for a window in every split.
    """
    if not isinstance(rows, int) or rows < 10 * (window + horizon + 1):
        raise DataError(f"rows is {rows!r}: give at least {10 * (window + horizon + 1)}, so that every split has some")
    rng = np.random.default_rng(seed)
    time = np.arange(rows)
    wander = 1.0 + 0.3 * np.sin(2 * np.pi * time / rng.uniform(300, 500))
    temperature = np.sin(2 * np.pi * time / 24.0) * wander + 0.5 * np.convolve(
        rng.normal(size=rows), np.ones(6) / 2, "same"
    )
    late = np.roll(temperature, 3)
    load = 0.7 * late + np.sin(2 * np.pi * time / 12.0 + 0.5) + 0.3 * late * late + noise * rng.normal(size=rows)
    both = np.stack([load, temperature], axis=1)[3:].astype(np.float32)
    target = (both[:, :1] * 20.0 + 100.0).astype(np.float32)
    splits, strides = {}, {"train": 1, "calibration": 1}
    for name, stretch in stretches_in_time(len(both)).items():
        x, y = windows(both, target, stretch, window, horizon, strides.get(name, horizon))
        splits[name] = (x, y[:, 0])
    assert splits.keys() == set(SPLITS)
    return Regression(
        splits,
        columns=tuple(f"load+{step}" for step in range(1, horizon + 1)),
        unit="MW",
        standardise=True,
        name="synthetic_forecast",
    )
