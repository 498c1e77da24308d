"""Opened LSTMs and GRUs answer as PyTorch's own do, stepwise and with factors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedLinear, SharedBasis
from edgewright.models.layers.recurrent import OpenRecurrent

CASES = list(itertools.product((nn.LSTM, nn.GRU), (1, 2), (False, True), (False, True), (True, False)))


def flat(answer: tuple[Tensor, Any]) -> list[Tensor]:
    return [answer[0], *(answer[1] if isinstance(answer[1], tuple) else (answer[1],))]


def close(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in pairs)


def factorized(model: OpenRecurrent, joint: bool) -> OpenRecurrent:
    """Every input matrix exactly as a product; of two directions with one basis if `joint`."""
    for number in range(model.num_layers):
        basis = None
        for suffix in ("", "_reverse") if model.bidirectional else ("",):
            direction = model.get_submodule(f"l{number}{suffix}")
            weight, bias = direction.input_gates.weight.detach(), direction.input_gates.bias
            basis = basis if joint and basis is not None else SharedBasis(torch.eye(weight.shape[1]) * 2.0)
            direction.input_gates = FactorizedLinear(basis, weight.T / 2.0, None if bias is None else bias.detach())
    return model


@pytest.mark.parametrize(("kind", "layers", "both", "batch_first", "bias"), CASES)
def test_it_answers_as_pytorchs_own(kind: Any, layers: int, both: bool, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = kind(5, 7, num_layers=layers, bidirectional=both, batch_first=batch_first, bias=bias).eval()
    assert OpenRecurrent.can_open(layer)
    opened = OpenRecurrent.of(layer)
    x, rows = torch.randn(3, 4, 5), 3 if batch_first else 4
    h, c = torch.randn(2, layers * (2 if both else 1), rows, 7)
    for hx in (None, (h, c) if kind is nn.LSTM else h):
        expected = layer(x, hx)
        assert close(opened(x, hx), expected)
        for joint in (False, True):
            assert close(factorized(OpenRecurrent.of(layer), joint)(x, hx), expected)
    assert close(opened(x[0]), layer(x[0])), "without a batch"


def test_gradients_reach_everything_and_dropout_is_between_layers() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(5, 7, num_layers=2, dropout=0.9)
    opened = factorized(OpenRecurrent.of(layer), joint=False)
    assert opened.training and opened.dropout == 0.9
    x = torch.randn(3, 4, 5)
    assert not torch.equal(opened(x)[0], opened(x)[0])
    opened(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in opened.parameters())


def test_what_computes_something_else_stays_closed() -> None:
    assert not OpenRecurrent.can_open(nn.LSTM(5, 7, proj_size=3))
    assert not OpenRecurrent.can_open(nn.RNN(5, 7))
    assert not OpenRecurrent.can_open(nn.utils.parametrizations.weight_norm(nn.LSTM(5, 7), "weight_hh_l0"))
