"""The distance to a teacher: a divergence over the axis of the classes, wherever it is, or values in their spread."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.values import ValuesKind
from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.pipeline.task import Batch
from edgewright.pipeline.training.distillation import Distillation, binary_divergence, class_axis, divergence

WHOLE = torch.int64


def _targets(*shape: int, dtype: torch.dtype = WHOLE) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("logits", "targets", "labels", "axis"),
    [
        ((8, 3), _targets(8), 3, 1),
        ((8, 3, 5, 7), _targets(8, 5, 7), 3, 1),  # a map of classes
        ((8, 5, 64), _targets(8, 5), 0, 2),  # tokens
        ((8, 64, 5), _targets(8, 5), 0, 1),  # a map of classes that have no names
        ((8, 3), _targets(8, 3, dtype=torch.float32), 3, None),  # several classes may be right
        ((8, 4), _targets(8, 4, dtype=torch.float32), 0, None),
        ((8, 1, 16, 16), _targets(8, 1, 16, 16, dtype=torch.float32), 0, None),
        ((8, 1), _targets(8), 0, None),  # one number: a softmax of it is 1 whatever it is
        ((8,), _targets(8, dtype=torch.float32), 0, None),
    ],
)
def test_which_axis_holds_the_classes(logits: tuple[int, ...], targets: Tensor, labels: int, axis: int | None) -> None:
    assert class_axis(torch.zeros(logits), targets, labels) == axis


def _distance(teacher: nn.Module, inputs: Tensor, targets: Tensor, found: Tensor, labels: int = 0) -> float:
    class Split:
        def __len__(self) -> int:
            return len(inputs)

        def batch(self, rows: Tensor) -> Batch:
            return Batch((inputs[rows],), targets[rows])

    task: Any = SimpleNamespace(labels=("a",) * labels)
    split: Any = Split()
    distil = Distillation(teacher, task, split, lambda net, x: net(*x), torch.device("cpu"))
    return float(distil(found, Batch((inputs,), targets)))


def test_a_map_of_classes_is_compared_at_every_place() -> None:
    torch.manual_seed(0)
    expected, found = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    by_hand = 0.0
    for n in range(2):
        for y in range(4):
            for x in range(5):
                p, q = expected[n, :, y, x].softmax(0), found[n, :, y, x].softmax(0)
                by_hand += float((p * (p.log() - q.log())).sum()) / 40
    assert float(divergence(found, expected, 1)) == pytest.approx(by_hand, rel=1e-5)
    assert _distance(nn.Identity(), expected, _targets(2, 4, 5), found, 3) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_values_are_compared_in_the_spread_of_the_teachers(unit: float) -> None:
    """The unit of the data does not matter, and a constant added to all of them counts, which a softmax cannot see."""
    inputs = unit * torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    spread = float(inputs.var(correction=0))
    targets = torch.zeros(32, 4)
    assert _distance(nn.Identity(), inputs, targets, inputs) == 0.0
    off = _distance(nn.Identity(), inputs, targets, inputs + unit)
    assert off == pytest.approx(unit**2 / spread, rel=1e-4) and 0.5 < off < 2.0
    alike = torch.full((32, 4), 3.0)
    assert _distance(nn.Identity(), alike, targets, alike + 2.0) == pytest.approx(4.0)


def _several(answers: tuple[AnswerSpec, ...], found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    class Split:
        def __len__(self) -> int:
            return 8

        def batch(self, rows: Tensor) -> Batch:
            return Batch((rows,), rows)

    task: Any = SimpleNamespace(labels=(), name="x", input_names=("x",), answers=answers)
    split: Any = Split()
    one = len(answers) == 1
    distil = Distillation(
        nn.Identity(), task, split, lambda net, x: expected["a"] if one else expected, torch.device("cpu")
    )
    return float(distil(found["a"] if one else found, Batch((torch.zeros(8),), torch.zeros(8))))


def test_of_several_answers_each_counts_in_its_own_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = {"a": torch.randn(8, 3, generator=generator), "b": 1000 * torch.randn(8, 2, generator=generator)}
    found = {"a": expected["a"].flip(1), "b": expected["b"] + 1000}
    kinds = (AnswerSpec("a", "classes", leaf="a"), AnswerSpec("b", "values", leaf="b"))
    by_hand = float(divergence(found["a"], expected["a"], 1)), 1000**2 / float(expected["b"].var(correction=0))
    assert _several(kinds, found, expected) == pytest.approx(sum(by_hand) / 2, rel=1e-4)
    assert _several(kinds, expected, expected) == 0.0
    alone = (AnswerSpec("a", "classes"),)
    assert _several(alone, found, expected) == pytest.approx(by_hand[0], rel=1e-5), "whatever the targets are"


def test_where_several_classes_may_be_right_each_is_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ValuesKind, "class_axis", 1)
    expected, found = torch.tensor([[0.0, 3.0], [-2.0, 1.0]]), torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    by_hand = 0.0
    for want, got in zip(expected.flatten().sigmoid().tolist(), found.flatten().sigmoid().tolist(), strict=True):
        by_hand += (want * math.log(want / got) + (1 - want) * math.log((1 - want) / (1 - got))) / 4
    spec = (AnswerSpec("a", "values"),)
    assert _several(spec, {"a": found}, {"a": expected}) == pytest.approx(by_hand, rel=1e-4)
    assert float(binary_divergence(expected, expected)) == pytest.approx(0.0, abs=1e-7)
