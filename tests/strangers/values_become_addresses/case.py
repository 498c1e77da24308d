"""Layers whose outputs are places to read from, or choose where the others go."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels


class Places(nn.Module):
    """`read` gets the features and what a layer made of them."""

    def __init__(self, places, read, **more):
        super().__init__()
        self.places, self.read = places, read
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.read(self, x, self.places(x))


def pooled(outputs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))


def boxes(p):
    p = p.sigmoid() * 5
    return torch.cat([torch.arange(len(p)).to(p)[:, None], p[:, :2], p[:, 2:] + 5], 1)


def looked_up(self, x, p):
    return x + self.table((p.sigmoid() * 9.99).long().squeeze(1)).permute(0, 3, 1, 2)


def gathered(self, x, p):
    where = (p.sigmoid() * 63.99).long().flatten(2).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, where).view_as(x)


def scattered(self, x, p):
    where = (p.sigmoid() * 63.99).long().flatten(2).expand(-1, x.shape[1], -1)
    return torch.zeros_like(x).flatten(2).scatter_add(2, where, x.flatten(2)).view_as(x)


def routed(self, x, p):
    return x * self.table.weight[p.topk(2, dim=1).indices].sum(1)[:, :, None, None]


def number(self, x, p):
    return x[:, :, : 2 + int(p.sum().sigmoid() * 3)]


def sampled(self, x, p):
    return F.grid_sample(x, p.tanh().permute(0, 2, 3, 1), align_corners=True)


def deformed(self, x, p):
    return self.conv(x, p)


def region(self, x, p):
    return torchvision.ops.roi_align(x, boxes(p), 8)


KINDS = {  # name: (module, what can be narrowed)
    "deformable": (
        lambda: Places(nn.Conv2d(16, 18, 3, 1, 1), deformed, conv=torchvision.ops.DeformConv2d(16, 16, 3, padding=1)),
        ["3"],
    ),
    "regions": (lambda: Places(pooled(4), region), ["0", "3"]),
    "grid": (lambda: Places(nn.Conv2d(16, 2, 1), sampled), ["0", "3"]),
    "table": (lambda: Places(nn.Conv2d(16, 1, 1), looked_up, table=nn.Embedding(10, 16)), ["0", "3"]),
    "gather": (lambda: Places(nn.Conv2d(16, 1, 1), gathered), ["0", "3"]),
    "scatter": (lambda: Places(nn.Conv2d(16, 1, 1), scattered), ["0", "3"]),
    "router": (lambda: Places(pooled(6), routed, table=nn.Embedding(6, 16)), ["0", "3"]),
    "python_number": (lambda: Places(pooled(2), number), ["0", "3"]),
}


def net(middle):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), middle(), nn.Conv2d(16, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def tell(right, name, seen):
    print("right" if right else "wrong", f"{name}: {' '.join(str(seen).split())[-300:]}", flush=True)


images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for name, (middle, wanted) in KINDS.items():
    try:
        model = net(middle)
        channels = find_channels(model, (images[:1],))
        names = [group.name for group in channels.groups]
        keep = channels.keep({group.name: torch.arange(1, group.units, 2) for group in channels.groups})
        with torch.no_grad():
            off = float((surgery.pruned(model, keep)(images) - surgery.masked(model, keep)(images)).abs().max())
        reason = next((why for path, why in channels.refused.items() if path.startswith("2.places")), "")
        tell(
            names == wanted and "places or choices" in reason and off < 1e-4,
            name,
            f"{names}, off by {off:.1g}, {reason}",
        )
    except Exception as error:
        tell(False, name, f"{type(error).__name__}: {error}")
