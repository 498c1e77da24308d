"""A network whose rows do not lie in the first axis of what crosses its exit."""

from __future__ import annotations

import torch
from tiny import CLASSES
from torch import nn

from edgewright.models.layers.multi_exit import HeadSpec, MultiExit


class Sequences(nn.Module):
    """Keeps its stream as [T, N, C] and shows [N, T, C] to an exit; also carries a constant and row numbers."""

    def __init__(self, fold: bool = False) -> None:
        super().__init__()
        self.fold = fold
        self.embed, self.shown, self.mix = nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        self.places = nn.Parameter(torch.randn(5, 1, 8))

    def forward(self, x):
        stream = self.embed(x).transpose(0, 1) + self.places
        folded = stream.transpose(0, 1).reshape(-1, 8) * 2.0
        y = self.shown(folded.view(x.shape[0], 5, 8) if self.fold else stream.transpose(0, 1))
        rest = torch.relu(self.mix(folded if self.fold else stream + y.transpose(0, 1)))
        rest = rest.view(x.shape[0], 5, 8) if self.fold else rest.transpose(0, 1)
        last = rest[torch.arange(x.shape[0]), x[:, :, 0].argmax(dim=1)]
        return self.head(last + torch.zeros(x.shape[0], 8))


def sequence_model(fold=False):
    torch.manual_seed(0)
    return MultiExit(Sequences(fold), [HeadSpec("shown", 8)], [3], CLASSES, "class_exclusion").eval()
