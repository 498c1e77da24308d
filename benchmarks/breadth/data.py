"""A tiny synthetic task for every architecture: random inputs, targets of the kind that it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from architectures import CLASSES, TABLE, Architecture, drawn, model
from torch import Tensor, nn

from edgewright.edge_runtime import AnswerSpec
from edgewright.pipeline import ImageClassification, Regression, Segmentation
from edgewright.pipeline.metric import Answer, Metric, Score
from edgewright.pipeline.task import SplitName, Task
from edgewright.pipeline.tasks.array_task import ArrayTask
from edgewright.pipeline.tasks.detection import Detection
from edgewright.pipeline.tasks.splits import TensorSplit

ROWS: Mapping[SplitName, int] = {"train": 32, "calibration": 16, "validation": 16, "test": 8}
LABELS = tuple(f"class{i}" for i in range(CLASSES))


class Nearness:
    """``1 / (1 + mean loss)``: bounded, so that no floor of a recipe is about the unit of random numbers."""

    name = "nearness"

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads them once."""
        total, rows = 0.0, 0
        for output, targets in answers:
            total += float(self._loss(output, targets)) * len(targets)
            rows += len(targets)
        mean = total / max(1, rows)
        return Score(1.0 / (1.0 + mean) if math.isfinite(mean) else 0.0, rows)

    def drop(self, before: float, after: float) -> float:
        """The difference."""
        return before - after


class Several(ArrayTask):
    """Answers of any kinds by name; each is drawn towards what the architecture itself gives for other rows.

    Args:
        splits: inputs and float targets, unused numbers for what is a class.
        specs: of the answers.
    """

    def __init__(self, splits: Mapping[SplitName, tuple[Any, Any]], specs: Sequence[AnswerSpec], names: Any) -> None:
        super().__init__(
            splits,
            preprocessing=None,
            augment=None,
            name="breadth",
            input_name=names,
            provenance=None,
            file_digests=None,
        )
        self._specs = tuple(specs)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """Several, or one."""
        return self._specs

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """The sum over the answers."""
        found = output if isinstance(output, Mapping) else {self._specs[0].name: output}
        return torch.stack([_loss(found[spec.name], spec.kind, targets) for spec in self._specs]).sum()

    @property
    def metric(self) -> Metric:
        """Of the loss."""
        return Nearness(self.loss)


def _loss(output: Tensor, kind: str, targets: Tensor) -> Tensor:
    """A row's number says which class, and how large its values are."""
    number = targets.to(torch.int64)
    if kind == "classes":
        return nn.functional.cross_entropy(output, number % output.shape[1])
    if kind == "class_map":
        wanted = (number % output.shape[1])[:, None, None].expand(-1, *output.shape[2:])
        return nn.functional.cross_entropy(output, wanted)
    if kind == "tokens":
        places = torch.arange(output.shape[1])
        return nn.functional.cross_entropy(output.transpose(1, 2), (number[:, None] + places) % output.shape[2])
    return (output - targets.float().reshape(-1, *(1,) * (output.dim() - 1)) / 4.0).square().mean()


def _boxes(numbers: Tensor, size: Sequence[int]) -> Tensor:
    """One for each row, of its class, in the corner that its number says."""
    side = torch.tensor([size[1] / 2, size[0] / 2])
    corner = torch.stack([numbers % 2, numbers // 2 % 2], dim=1) * side
    return torch.cat([(numbers % CLASSES)[:, None].float(), corner, corner + side], dim=1)[:, None]


def task(name: str) -> Task:
    """The task of the architecture called `name`; the function that recipes name."""
    made: Architecture = TABLE[name]
    names = [spec.name for spec in made.inputs]
    parts: dict[SplitName, tuple[list[Tensor], Tensor]] = {}
    for seed, (split, rows) in enumerate(ROWS.items()):
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.arange(rows) % CLASSES
        inputs = [drawn(spec, rows, generator) for spec in made.inputs]
        # a class that can be learned: its rows are shifted
        inputs = [x + 0.5 * numbers.reshape(-1, *(1,) * (x.dim() - 1)) if x.is_floating_point() else x for x in inputs]
        parts[split] = (inputs, numbers)
    if made.answers is not None:
        specs = [
            AnswerSpec(str(leaf), kind, LABELS if kind in ("classes", "class_map") else (), leaf=leaf)
            for leaf, kind in made.answers.items()
        ]
        return Several(parts, specs, names)
    if made.kind == "classes":
        return ImageClassification({s: TensorSplit(x, y) for s, (x, y) in parts.items()}, LABELS, input_name=names)
    if made.kind == "tokens":
        return Several(parts, [AnswerSpec("logits", "tokens")], names)
    if made.kind == "boxes":
        boxes = {s: (x, _boxes(y, made.inputs[0].shape[1:])) for s, (x, y) in parts.items()}
        seen = Detection(boxes, LABELS, size=made.inputs[0].shape[1:], decoder="model", input_name=names)
        return seen.for_model(model(name))
    with torch.no_grad():
        shape = model(name)(*(x[:1] for x in parts["test"][0])).shape[1:]
    if made.kind == "class_map":
        maps = {s: (x, y[:, None, None].expand(-1, *shape[1:]).contiguous()) for s, (x, y) in parts.items()}
        return Segmentation(maps, LABELS, metric="pixel_accuracy", input_name=names)
    values = {
        s: (x, (y.float() / 4.0).reshape(-1, *(1,) * len(shape)).expand(-1, *shape).contiguous())
        for s, (x, y) in parts.items()
    }
    return Regression(values, metric=Nearness(lambda o, t: (o - t).square().mean()), input_name=names)
