"""A small network with something per channel in its middle, and data for it."""

import torch
from torch import nn
from torch.nn import functional as F

from edgewright.pipeline import ImageClassification


def task(rows=200):
    labels = torch.arange(rows) % 4
    images = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return ImageClassification.from_arrays(images + 0.5 * labels[:, None, None, None], labels, list("wxyz"))


class AntiAlias(nn.Module):
    """Every channel through the same fixed filter, each with a copy of it."""

    def __init__(self, channels):
        super().__init__()
        taps = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("taps", torch.outer(taps, taps).expand(channels, 1, 3, 3).clone())

    def forward(self, x):
        return F.conv2d(x, self.taps, stride=2, padding=1, groups=x.shape[1])


class Table(nn.Module):
    """`how` says what is done with the buffer."""

    def __init__(self, values, how):
        super().__init__()
        self.register_buffer("values", values)
        self.how = how

    def forward(self, x):
        return self.how(x, self.values)


class Statistics(nn.Module):
    """A normalisation of one's own, which keeps means and variances."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, channels))
        self.register_buffer("var", torch.linspace(0.5, 2, channels).view(1, -1, 1, 1))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3)), 0.05)
        return (x - self.mean[:, None, None]) * self.var.rsqrt()


MIDDLES = {
    "blur": lambda: AntiAlias(16),
    "layer_scale": lambda: Table(torch.full((16,), 1e-5), lambda x, t: x * t.view(-1, 1, 1)),
    "positions": lambda: Table(torch.randn(1, 16, 8, 8), torch.add),
    "channels_last": lambda: Table(torch.randn(8, 8, 16), lambda x, t: (x.permute(0, 2, 3, 1) + t).permute(0, 3, 1, 2)),
    "statistics": lambda: Statistics(16),
    "whole_numbers": lambda: Table(torch.arange(1, 17), lambda x, t: x * t.view(-1, 1, 1)),
    "truth_values": lambda: Table(torch.arange(16) % 3 > 0, lambda x, t: x.masked_fill(~t.view(-1, 1, 1), 0)),
}


def net(kind="blur"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), MIDDLES[kind](), nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
