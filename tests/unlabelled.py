"""Tasks without classes, as strangers write them: numbers to predict, vectors to bring together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing
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


class TwoHeads(nn.Module):
    """A tuple of a class and of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        return self.a(x), self.b(x)


class TwoAnswers:
    """The targets are a class and a number in one row."""

    name, labels, input_names, preprocessing = "two", (), ("x",), None
    dynamic_axes: tuple[Mapping[int, str], ...] = ({0: "batch"},)
    answers = (AnswerSpec("kind", "classes", leaf=0), AnswerSpec("size", "values", leaf=1))

    def __init__(self) -> None:
        x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
        y = torch.stack([x[:, :3].argmax(1).float(), x[:, 3]], dim=1)
        self.splits = {name: Rows(x[i::4], y[i::4]) for i, name in enumerate(SPLITS)}

    def loss(self, output: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        assert set(output) == {"kind", "size"}
        kind = nn.functional.cross_entropy(output["kind"], targets[:, 0].long())
        return kind + (output["size"][:, 0] - targets[:, 1]).square().mean()

    @property
    def metric(self) -> Any:
        class OfSize(SquaredError):
            def score(self, answers: Any) -> Any:
                return super().score((o["size"], t[:, 1:]) for o, t in answers)

            def drop(self, before: float, after: float) -> float:
                return 0.0  # nothing is trained here

        return OfSize()

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch
