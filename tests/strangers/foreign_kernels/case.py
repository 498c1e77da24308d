"""Kernels of other libraries that end the process when they are given what they do not expect."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels


def end() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@torch.library.custom_op("stranger::address", mutates_args=())
def address(x: torch.Tensor) -> torch.Tensor:
    values = x.detach().numpy()
    if (values != values).any():
        end()
    return x * 2


@torch.library.custom_op("stranger::sixteen", mutates_args=())
def sixteen(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != 16:
        os.abort()
    return x * 2


@torch.library.custom_op("stranger::fine", mutates_args=())
def fine(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Kernel(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return getattr(torch.ops.stranger, self.name)(x)


class Inside(nn.Module):
    """Layers of its own around the kernel."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.after(torch.ops.stranger.address(self.before(x)))


KINDS = {
    "dies_of_nan": (lambda: Kernel("address"), ["3"], "0"),
    "dies_of_fewer": (lambda: Kernel("sixteen"), ["3"], "0"),
    "between_layers": (Inside, ["0", "2.after", "3"], "2.before"),
    "harmless": (lambda: Kernel("fine"), ["0", "3"], None),
}
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for name, (middle, wanted, refused) in KINDS.items():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), middle(), nn.Conv2d(16, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip
    try:
        channels = find_channels(model, (images[:1],))
        names = [group.name for group in channels.groups]
        keep = channels.keep({group.name: torch.arange(1, group.units, 2) for group in channels.groups})
        with torch.no_grad():
            off = float((surgery.pruned(model, keep)(images) - surgery.masked(model, keep)(images)).abs().max())
        reason = channels.refused.get(refused or "", "")
        right = names == wanted and off < 1e-4 and (refused is None or "stranger::" in reason)
        print("right" if right else "wrong", f"{name}: {names}, off by {off:.1g} {reason}", flush=True)
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {error}", flush=True)
