"""Small, and sensitive to where colours lie."""

from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
