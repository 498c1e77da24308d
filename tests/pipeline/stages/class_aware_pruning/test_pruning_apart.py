"""Compiled code of other libraries: what it does to its process is a reason, not an end."""

from __future__ import annotations

import os
import signal
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgewright.pipeline.analysis.channels import apart, surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.errors import StageError

IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))


def _end_here() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@torch.library.custom_op("edgewright_test::brittle", mutates_args=())
def brittle(x: Tensor) -> Tensor:
    """A kernel that does not check what it is given."""
    if bool(torch.isnan(x).any()):
        _end_here()
    return x.tanh()


@torch.library.custom_op("edgewright_test::eight_wide", mutates_args=())
def eight_wide(x: Tensor) -> Tensor:
    """A kernel that counts on eight channels."""
    if x.shape[1] != 8:
        _end_here()
    return x.tanh()


class Calling(nn.Module):
    """A function of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def around(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), middle, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("function", [brittle, eight_wide])
def test_an_operator_that_ends_the_process_is_pruned_around(function: Any) -> None:
    model = around(Calling(lambda x: function(x)))
    channels = find_channels(model, (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["3"] and channels.foreign
    assert "edgewright_test::" in channels.refused["0"] and "'2'" in channels.refused["0"]
    keep = channels.keep({"3": torch.tensor([0, 2, 5])})
    with torch.no_grad():
        assert torch.allclose(surgery.pruned(model, keep)(IMAGES), surgery.masked(model, keep)(IMAGES), atol=1e-6)


def test_an_operator_that_can_be_followed_is() -> None:
    @torch.library.custom_op("edgewright_test::harmless", mutates_args=())
    def harmless(x: Tensor) -> Tensor:
        return x.tanh()

    assert [g.name for g in find_channels(around(Calling(lambda x: harmless(x))), (IMAGES[:1],)).groups] == ["0", "3"]


def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this file's code refer to a compiled module, as a binding without operators of PyTorch's would be."""
    binding = types.ModuleType("edgewright_test_binding")
    binding.__file__ = "edgewright_test_binding.so"
    monkeypatch.setitem(sys.modules, binding.__name__, binding)
    monkeypatch.setattr(sys.modules[__name__], "binding", binding, raising=False)


def test_a_binding_that_pytorch_does_not_see_is_closed_with_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x: Tensor) -> Tensor:
        if np.isnan(x.detach().numpy()).any():
            _end_here()
        return x.tanh()

    compiled(monkeypatch)
    channels = find_channels(around(Calling(kernel)), (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["3"]
    assert "it reaches 2, compiled code" in channels.refused["0"]


def test_where_everything_ends_the_process_nothing_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if np.isnan(y.detach().numpy()).any():
                _end_here()
            logits: Tensor = self.out(y.mean(dim=(2, 3)))
            return logits

    compiled(monkeypatch)
    channels = find_channels(Whole().eval(), (IMAGES[:1],))
    assert not channels.groups and "SIGSEGV" in channels.refused["conv"]


def test_what_work_returns_and_raises_arrives_and_a_hanging_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Calling(lambda x: signal.pause()))

    def refuse() -> None:
        raise StageError("no")

    assert torch.equal(apart.in_a_process(model, lambda: torch.arange(200_000)), torch.arange(200_000))
    with pytest.raises(StageError, match=r"^no$"):
        apart.in_a_process(model, refuse)
    monkeypatch.setattr(apart, "_SILENCE_S", 0.5)
    with pytest.raises(apart.EndedError, match="hung") as caught:
        apart.in_a_process(model, lambda: model(IMAGES))
    assert caught.value.place == "0"


def test_networks_of_pytorch_alone_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", fork)
    assert not find_channels(around(nn.ReLU()), (IMAGES[:1],)).foreign
