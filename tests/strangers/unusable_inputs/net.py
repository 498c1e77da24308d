import os  # noqa: F401
from builtins import eval as evil  # noqa: F401

import torch
from torch import nn


def net(width=4):
    return nn.Sequential(nn.Linear(6, 16 * width), nn.ReLU(), nn.Linear(16 * width, 2))


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(6, 4)), nn.Linear(4, 2))


def traced():
    return nn.Sequential(nn.Linear(6, 4), torch.jit.trace(nn.Linear(4, 2), torch.randn(1, 4)))


def task(labels=("cat", "dog")):
    from edgewright.pipeline import ImageClassification

    y = torch.arange(120) % 2
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0)) + y[:, None]
    return ImageClassification.from_arrays(x, y, labels)


def twice():
    return task(("cat", "cat"))
