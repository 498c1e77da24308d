"""Numbers that are made up: three smooth functions of eight inputs, to try recipes for regression on."""

from __future__ import annotations

import torch

from ...errors import DataError
from ..regression import Regression


def synthetic_regression(seed: int = 0, rows: int = 600, noise: float = 0.05) -> Regression:
    """Three columns in millimetres, about 50, 100 and 150, of inputs [8]; standardised for the model.

    Args:
        seed: of inputs and functions.
        rows: of all splits together.
        noise: standard deviation of what cannot be predicted, before the columns get their scale.

    Raises:
        DataError: too few rows to be split.
    """
    if not isinstance(rows, int) or rows < 20:
        raise DataError(f"rows is {rows!r}: give at least 20, so that every split has some")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    mix = torch.randn(8, 3, generator=generator) / 8**0.5
    y = torch.tanh(x @ mix) + noise * torch.randn(rows, 3, generator=generator)
    y = y * torch.tensor([5.0, 10.0, 15.0]) + torch.tensor([50.0, 100.0, 150.0])
    return Regression.from_arrays(
        x,
        y,
        columns=("length", "width", "height"),
        unit="mm",
        standardise=True,
        seed=seed,
        name="synthetic_regression",
    )
