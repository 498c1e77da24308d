"""Models that answer a row otherwise: which of three causes it has, and where."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.pipeline.errors import ModelError
from edgewright.pipeline.runs.row_answers import check_rows

ROWS = (torch.randn(2, 6, generator=torch.Generator().manual_seed(3)),)


class Around(nn.Module):
    """`middle` between two linear layers, or a function of the model's own forward."""

    def __init__(self, middle: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(self.first(x)))
        return logits


class Variational(nn.Module):
    """Draws from a distribution, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * 0.1


class KeptInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> KeptInTraining:
        del mode
        return super().train(True)


class Observer(nn.Module):
    """Divides by a moving average that every call updates, or by the largest value so far."""

    def __init__(self, moving: bool) -> None:
        super().__init__()
        self.moving = moving
        self.register_buffer("range", torch.full((), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.get_buffer("range")
        now = x.detach().abs().max()
        seen.copy_(0.9 * seen + 0.1 * now if self.moving else torch.maximum(seen, now))
        return x / seen


class Centred(nn.Module):
    """Normalises over the batch, as a batch norm without running statistics, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return x - x.mean(dim=0)


class Counting(nn.Module):
    """Counts its calls, and keeps a table that its first call makes; neither changes an answer."""

    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[1])
        return F.dropout(x, 0.5, self.training) + self.table


def told(middle: nn.Module | Callable[[Tensor], Tensor], rows: int = 2) -> str:
    torch.manual_seed(0)
    model = Around(middle).eval()
    with pytest.raises(ModelError) as caught:
        check_rows(model, (ROWS[0][:rows],), "net", lambda inputs: model(*inputs))
    return str(caught.value)


@pytest.mark.parametrize("rows", [1, 2])
def test_random_numbers_are_named_with_the_module_and_what_helps(rows: int) -> None:
    dropped = told(lambda x: F.dropout(x, 0.3), rows)
    assert "every time it is asked" in dropped and "the forward of Around itself draws random numbers" in dropped
    assert "training=self.training" in dropped
    assert "'middle' (Variational) draws random numbers (randn" in told(Variational(), rows)
    assert "'middle' (KeptInTraining) draws" in told(KeptInTraining(0.4), rows)
    assert "random numbers of Python or NumPy" in told(lambda x: x * random.random(), rows)
    gumbel = told(lambda x: F.gumbel_softmax(x, hard=True), rows)
    assert "draws random numbers (exponential" in gumbel and "`if self.training:`" in gumbel


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("moving", [True, False])
def test_state_that_every_call_changes_is_named(moving: bool, rows: int) -> None:
    text = told(Observer(moving), rows)
    assert "changes its own state at every call" in text and "'middle.range'" in text and "Observer" in text
    assert "disable_observer" in text and "random" not in text


def test_rows_that_are_mixed_are_named_with_the_module() -> None:
    assert "mixes the rows of a batch, in 'middle' (Centred)" in told(Centred())
    assert "mixes the rows of a batch, in the forward of Around itself" in told(lambda x: x - x.mean(dim=0))


def test_what_does_not_change_an_answer_is_no_matter() -> None:
    model = Around(Counting()).eval()
    output = check_rows(model, ROWS, "net", lambda inputs: model(*inputs))
    assert output.shape == (2, 3)
