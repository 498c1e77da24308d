"""Convolutions and linear layers by type, with a tensor more than PyTorch's have."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels

warnings.simplefilter("ignore")


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6).sqrt()
        return self._conv_forward(x, w * getattr(self, "gain", 1.0), self.bias)


class StandardisedWithGain(Standardised):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(args[1], 1, 1, 1))


class Normed(nn.Conv2d):
    """As in networks without normalisation: `batch_norm` of the weight itself."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(rows, None, None, weight=self.scale.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


class GainOut(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x):
        return super().forward(x) * self.gain


class GainIn(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("gain", torch.ones(self.in_features))

    def forward(self, x):
        return super().forward(x * self.gain)


class LowRank(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.down = nn.Parameter(torch.randn(3, self.in_features))
        self.up = nn.Parameter(torch.zeros(self.out_features, 3))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Spread(nn.Conv2d):
    """Every filter depends on all others."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias, self.stride, self.padding)


def new_norm(*args):
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(*args))


def old_norm(*args):
    return nn.utils.weight_norm(nn.Conv2d(*args))


def spectral(*args):
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(*args))


def old_spectral(*args):
    return nn.utils.spectral_norm(nn.Conv2d(*args))


def net(conv=nn.Conv2d, linear=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 20, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(20, 10), nn.ReLU(), nn.Linear(10, 4),
    ).eval()  # fmt: skip


def tell(right, name, seen):
    print("right" if right else "wrong", f"{name}: {' '.join(str(seen).split())[-300:]}", flush=True)


def narrowed(model):
    images = torch.randn(2, 3, 16, 16)
    channels = find_channels(model, (images[:1],))
    names = [group.name for group in channels.groups]
    keep = channels.keep({group.name: torch.arange(1, group.units, 2) for group in channels.groups})
    with torch.no_grad():
        expected = surgery.masked(model, keep)(images)
        off = float((surgery.pruned(model, keep)(images) - expected).abs().max() / expected.abs().max())
    return channels, names, off


WHOLE = {
    "standardised": (Standardised, nn.Linear),
    "gain": (StandardisedWithGain, GainOut),
    "normed_weight": (Normed, nn.Linear),
    "gain_of_inputs": (nn.Conv2d, GainIn),
    "low_rank": (nn.Conv2d, LowRank),
    "weight_norm": (new_norm, nn.Linear),
    "weight_norm_old": (old_norm, nn.Linear),
}
for name, kinds in WHOLE.items():
    try:
        channels, names, off = narrowed(net(*kinds))
        tell(names == ["0", "3", "7"] and off < 1e-4, name, f"{names}, off by {off:.1g}, {dict(channels.refused)}")
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
REFUSED = {
    "spread": (Spread, "depends on the others"),
    "spectral": (spectral, "parametriz"),
    "spectral_old": (old_spectral, "parametriz"),
}
for name, (conv, reason) in REFUSED.items():
    try:
        channels, names, off = narrowed(net(conv))
        tell(
            names == ["7"] and off < 1e-4 and reason in channels.refused["0"],
            name,
            f"{names}, {dict(channels.refused)}",
        )
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
