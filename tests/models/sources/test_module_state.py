"""A user's module after we ran it: as before, whatever its forward keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from first_call import NETWORKS, InAttribute, InDict, InHelper, InList, WeightNorm
from torch import Tensor, nn

from edgewright.models.sources.module_state import copied, untouched


def state(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Everything that a module holds, with the identity of the objects and the values of tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (id(value), value.requires_grad, value.tolist())
        if isinstance(value, dict):
            return (id(value), {str(key): plain(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return (id(value), [plain(item) for item in value])
        return (id(value), plain(vars(value))) if hasattr(value, "__dict__") and not callable(value) else repr(value)

    return [(path, key, plain(v)) for path, module in model.named_modules() for key, v in vars(module).items()]


@pytest.mark.parametrize("network", NETWORKS)
def test_everything_is_back(network: Any) -> None:
    model = network()
    before = state(model)
    with untouched(model):
        model.eval()(torch.randn(2, 3, 8, 8)).sum().backward()
        model.conv.weight_g if network is WeightNorm else model.conv.bias.requires_grad_(False)
        model.fc.register_forward_hook(lambda *_: None)
        assert state(model) != before
    assert state(model) == before
    assert all(p.grad is None for p in model.parameters())
    model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("network", [InAttribute, InList, InDict, InHelper])
def test_no_fake_tensor_stays_after_a_trace_that_fails(network: Any) -> None:
    model = network()

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.model(x)
            return answer if float(answer.sum()) > 0 else -answer

    with pytest.raises(Exception, match="data-dependent"), untouched(model):
        torch.export.export(Failing(), (torch.randn(2, 3, 8, 8),), strict=False)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_values_that_are_written_in_place_are_back() -> None:
    class Counting(nn.BatchNorm1d):
        pass

    model = Counting(3)
    with untouched(model):
        model(torch.randn(4, 3))
        assert int(model.num_batches_tracked or 0) == 1
    assert int(model.num_batches_tracked or 0) == 0 and model.running_mean is not None
    assert model.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_a_copy_of_what_keeps_a_result_with_gradients() -> None:
    model = WeightNorm()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        __import__("copy").deepcopy(model)
    other, x = copied(model), torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    assert not set(map(id, tensors(other))) & set(map(id, tensors(model)))


def tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor))
