"""Tasks without classes, as strangers write them: numbers to predict, vectors to bring together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.pipeline.metric import Answer, Score
from edgewright.pipeline.task import Batch

SPLITS = ("train", "calibration", "validation", "test")


class Rows:
    """Inputs and float targets of any shape."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        return [hashlib.sha256(row.numpy().tobytes()).digest() for row in self.inputs]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        chosen = torch.as_tensor(list(indices) if isinstance(indices, range) else indices)
        return Batch((self.inputs[chosen],), self.targets[chosen])


class SquaredError:
    name = "squared_error"

    def score(self, answers: Iterable[Answer]) -> Score:
        total, count = 0.0, 0
        for output, targets in answers:
            total += float((output - targets).square().sum())
            count += targets.numel()
        return Score(total / count, count)

    def drop(self, before: float, after: float) -> float:
        return after - before


class Regression:
    """Sums of the inputs; the loss takes apart the first target and the others, so no other shape will do."""

    name = "sums"
    labels: tuple[str, ...] = ()
    input_names = ("x",)
    dynamic_axes = ({0: "batch"},)
    preprocessing = Preprocessing()
    provenance: Mapping[str, Any] = {}
    metric = SquaredError()

    def __init__(self, outputs: int = 2, rows: int = 48, shape: tuple[int, ...] = (8,)) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(8, outputs, generator=generator) / 4
        self.splits = {}
        for name in SPLITS:
            x = torch.randn(rows, *shape, generator=generator)
            self.splits[name] = Rows(x, x.flatten(1)[:, :8] @ mix)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        first, others = (output - targets).square().split([1, targets.shape[1] - 1], dim=1)
        return first.mean() + (others.mean() if others.numel() else 0.0)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        del generator
        return batch


class Embedding(Regression):
    """Vectors [N, D] that point where the targets do."""

    name = "vectors"

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return 1.0 - nn.functional.cosine_similarity(output, targets).mean()


def network(outputs: int = 2, width: int = 16) -> nn.Module:
    """For inputs [N, 8]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    ).eval()
