"""Models, samples and targets in half precision."""

import torch
from torch import nn

from edgewright.pipeline import ImageClassification

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def plain():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def whole(dtype):
    return plain().to(HALF[dtype])


def part(dtype):
    model = plain()
    model[0].to(HALF[dtype])
    return model


class Cast(nn.Module):
    """Answers in half precision."""

    def __init__(self, dtype):
        super().__init__()
        self.model, self.dtype = plain(), HALF[dtype]

    def forward(self, x):
        return self.model(x).to(self.dtype)


class Autocast(Cast):
    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.model(x)


class Halved(ImageClassification):
    """Samples in half precision."""

    dtype = torch.float16

    @property
    def splits(self):
        return {name: Half(split, self.dtype) for name, split in super().splits.items()}


class Half:
    def __init__(self, split, dtype):
        self.split, self.dtype = split, dtype

    def __getattr__(self, name):
        return getattr(self.split, name)

    def __len__(self):
        return len(self.split)

    def batch(self, rows):
        batch = self.split.batch(rows)
        return type(batch)(tuple(x.to(self.dtype) for x in batch.inputs), batch.targets)


def task(halved=False):
    def rows(seed):
        y = torch.arange(30) % 3
        x = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
        return x + nn.functional.one_hot(y, 6) * 3, y

    splits = {name: rows(seed) for seed, name in enumerate(("train", "validation", "test"))}
    return (Halved if halved else ImageClassification)(splits, ["p", "q", "r"])
