"""Models whose values do not all come back from a checkpoint are refused, with what to do."""

from __future__ import annotations

import first_call
import pytest
import tiny
import torch
from torch import Tensor, nn

from edgewright.pipeline.errors import ModelError
from edgewright.pipeline.runs.reproducibility import check_reproducible


class Projected(nn.Module):
    """A fixed projection that is kept in one of several places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        values = torch.randn(4, 4)
        self.place = place
        if place in ("buffer", "temporary"):
            self.register_buffer("projection", values, persistent=place == "buffer")
        elif place == "attribute":
            self.projection = values
        elif place == "computed":
            self.projection = torch.eye(4)
        else:
            self.values = [values]
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x @ (self.values[0] if self.place == "list" else self.projection))
        return logits


class Noisy(nn.Linear):
    """Dropout that nobody switches off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def two(build, *args):  # type: ignore[no-untyped-def]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build(*args).eval())
    return models


@pytest.mark.parametrize("place", ["buffer", "computed"])
def test_values_that_come_back_are_fine(place: str) -> None:
    check_reproducible(*two(Projected, place), [torch.randn(2, 4)], "mine")


@pytest.mark.parametrize(
    ("place", "wanted"),
    [("temporary", "'projection' has other"), ("attribute", "'projection' has other"), ("list", "answers differently")],
)
def test_values_that_do_not_come_back_are_named(place: str, wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted) as caught:
        check_reproducible(*two(Projected, place), [torch.randn(2, 4)], "mine")
    assert "buffer" in str(caught.value)


def test_a_random_forward_is_refused() -> None:
    with pytest.raises(ModelError, match="forward pass draws random"):
        check_reproducible(*two(Noisy, 4, 64), [torch.randn(2, 4)], "mine")


def test_sizes_that_are_drawn_are_refused() -> None:
    def drawn() -> nn.Module:
        return nn.Linear(4, int(torch.randint(2, 40, ())))

    with pytest.raises(ModelError, match="sizes must depend on the arguments"):
        check_reproducible(*two(drawn), [torch.randn(2, 4)], "mine")


@pytest.mark.parametrize("build", [tiny.tiny_residual, tiny.tiny_transformer])
def test_ordinary_models_pass(build) -> None:  # type: ignore[no-untyped-def]
    check_reproducible(build(0), build(1), [torch.randn(2, 1, 12, 12)], "mine")


@pytest.mark.parametrize("network", first_call.NETWORKS)
def test_what_the_first_call_makes_is_no_difference(network) -> None:  # type: ignore[no-untyped-def]
    model, other = two(network)
    with torch.no_grad():
        # as `check_model` has done by then, with another number of rows
        model(torch.randn(1, 3, 8, 8))
        late = check_reproducible(model, other, [torch.randn(2, 3, 8, 8)], "mine")
    made = {"InBuffer": ["mask"], "InEmptyBuffer": ["mask"], "InParameter": ["scale"]}
    assert list(late) == made.get(network.__name__, [])


def test_a_random_table_of_the_first_call_is_refused() -> None:
    class Drawn(nn.Linear):
        table = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.randn(x.shape[-1])
            return super().forward(x + self.table)

    with torch.no_grad(), pytest.raises(ModelError, match="'table' has other values each time"):
        check_reproducible(*two(Drawn, 4, 3), [torch.randn(2, 4)], "mine")
