"""A forecast of two numbers, vectors that shall point somewhere, and a network for both."""

import hashlib

import torch
from torch import nn

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.pipeline import Batch, Score


class Part:
    def __init__(self, seed, columns):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(40, 6, generator=generator)
        self.targets = torch.stack([self.x.sum(1), self.x[:, 0] - self.x[:, 1]], 1)[:, :columns]

    @property
    def sample_digests(self):
        return [hashlib.sha256(row.numpy().tobytes()).digest() for row in self.x]

    def __len__(self):
        return len(self.x)

    def batch(self, rows):
        rows = torch.as_tensor(list(rows) if isinstance(rows, range) else rows)
        return Batch((self.x[rows],), self.targets[rows])


class Distance:
    name = "distance"

    def score(self, answers):
        pairs = [((o.reshape(len(t), -1) - t.reshape(len(t), -1)).abs().mean(), len(t)) for o, t in answers]
        rows = sum(n for _, n in pairs)
        return Score(float(sum(d * n for d, n in pairs)) / rows, rows)

    def drop(self, before, after):
        return after - before


class Forecast:
    name, labels, input_names, dynamic_axes = "forecast", (), ("x",), ({0: "batch"},)
    preprocessing, provenance, metric = Preprocessing(), {}, Distance()

    def __init__(self, columns=2):
        names = ("train", "calibration", "validation", "test")
        self.splits = {name: Part(seed, columns) for seed, name in enumerate(names)}

    def loss(self, output, targets):
        output = output.reshape(targets.shape)
        weights = torch.tensor([1.0, 3.0])[: targets.shape[1]]  # one weight a column: no other width will do
        return ((output - targets) ** 2 * weights).mean()

    def augment(self, batch, generator):
        return batch


class Vectors(Forecast):
    name = "vectors"

    def loss(self, output, targets):
        return 1 - nn.functional.cosine_similarity(output, targets).mean()


def forecast():
    return Forecast()


def one_number():
    return Forecast(1)


def vectors():
    return Vectors()


def network(outputs=2, flat=False):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, *([nn.Flatten(0)] if flat else []))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.out(x + self.down(torch.relu(self.up(x))))
