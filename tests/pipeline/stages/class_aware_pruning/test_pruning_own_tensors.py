"""Tensors beyond those of PyTorch's layers: buffers with an entry per channel, gains, low ranks, derived weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.groups import Channels

IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))


class Applied(nn.Module):
    """`function` of the input and of the buffer `table`."""

    def __init__(self, table: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.get_buffer("table"))


class CustomNorm(nn.Module):
    """Running statistics that are updated in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("var", 0.5 + torch.rand(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("mean").lerp_(x.mean(dim=(0, 2, 3)), 0.1)
        return (x - self.get_buffer("mean")[:, None, None]) / self.get_buffer("var").sqrt()


class Moving(nn.Module):
    """A running maximum that every call updates, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        most = self.get_buffer("most")
        most.copy_(torch.maximum(most, x.detach().amax(dim=(0, 2, 3))))
        return x / (1.0 + most[:, None, None].abs())


def between(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), middle, nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(4)
    )


KERNEL = torch.tensor([1.0, 2.0, 1.0])
BUFFERS: dict[str, Callable[[], nn.Module]] = {
    "blur": lambda: Applied(
        (KERNEL[:, None] * KERNEL / 16).repeat(12, 1, 1, 1), lambda x, t: F.conv2d(x, t, padding=1, groups=x.shape[1])
    ),
    "positions": lambda: Applied(torch.randn(1, 12, 8, 8), torch.add),
    "last axis": lambda: Applied(torch.rand(8, 12) + 0.5, lambda x, t: (x.movedim(1, -1) * t).movedim(-1, 1)),
    "layer scale": lambda: Applied(torch.full((12,), 1e-6), lambda x, t: x * t[:, None, None]),
    "statistics": CustomNorm,
    "moving": Moving,
    "booleans": lambda: Applied(torch.rand(12) > 0.4, lambda x, t: x.masked_fill(~t[:, None, None], 0.0)),
    "integers": lambda: Applied(torch.arange(1, 13), lambda x, t: x * t[:, None, None]),
}


def proven(model: nn.Module, channels: Channels, name: str) -> nn.Module:
    """The model with three units of a group fewer, which computes what the masked one does."""
    group = next(g for g in channels.groups if g.name == name)
    keep = channels.keep({name: torch.tensor([u for u in range(group.units) if u not in (0, 3, 4)])})
    small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
    # as a checkpoint does: from JSON, in a copy of the given model
    again = copy.deepcopy(model)
    surgery.prune(again, surgery.from_json(surgery.to_json(keep)), surgery.changed_attributes(model, keep))
    with torch.no_grad():
        expected, found = dense(IMAGES), small(IMAGES)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(again(IMAGES), small(IMAGES)) or name == "moving"
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_with_an_entry_per_channel_are_narrowed_along(kind: str) -> None:
    model = between(BUFFERS[kind]())
    with torch.no_grad():
        model(IMAGES)
    before = copy.deepcopy(model.eval().state_dict())
    channels = find_channels(model, (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["0", "3"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "marks stay nowhere"
    if kind != "moving":
        small = proven(model, channels, "0")
        assert 9 in next(small[2].buffers()).shape


class StandardConv(nn.Conv2d):
    """Weight standardisation with a gain, as in networks without normalisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) * (var + 1e-5).rsqrt() * self.gain, self.bias, self.stride)


class LowRankConv(nn.Conv2d):
    """A low-rank addition made of layers inside the layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Conv2d(self.in_channels, 2, 3), nn.Conv2d(2, self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class LowRankLinear(nn.Linear):
    """A low-rank addition that begins at zero, with a gain per input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.gain = nn.Parameter(torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        return super().forward(x) + x @ self.a.T @ self.b.T


class Softened(nn.Conv2d):
    """Filters that are normalised over each other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


class Turned(nn.Conv2d):
    """Reads its channels in the other order."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def old_weight_norm(*args: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer: nn.Module = nn.utils.weight_norm(nn.Conv2d(*args))
    return layer


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "standardised": StandardConv,
    "low rank": LowRankConv,
    "weight norm": lambda *args: nn.utils.parametrizations.weight_norm(nn.Conv2d(*args)),
    "old weight norm": old_weight_norm,
    "masked": lambda *args: prune.random_unstructured(nn.Conv2d(*args), "weight", 0.3),
}


def stack(layer: Callable[..., nn.Module], linear: Callable[..., nn.Module] = nn.Linear) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), layer(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), linear(12, 12), nn.ReLU(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_tensors_of_a_layers_own_are_narrowed_along(kind: str) -> None:
    model = stack(LAYERS[kind], LowRankLinear)
    channels = find_channels(model, (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["0", "3", "7"]
    for group in channels.groups:
        small = proven(model, channels, group.name)
    assert small[7].b.shape == (9, 2)


def test_a_layer_that_cannot_be_narrowed_says_why_and_leaves_the_others() -> None:
    def refused(layer: Callable[..., nn.Module]) -> dict[str, str]:
        channels = find_channels(stack(layer), (IMAGES[:1],))
        assert "7" in {g.name for g in channels.groups}
        return dict(channels.refused)

    assert "depends on the others" in refused(Softened)["0"]
    assert "reads it: the forward of Turned" in refused(Turned)["0"]
    assert "parametrized" in refused(lambda *a: nn.utils.parametrizations.spectral_norm(nn.Conv2d(*a)))["3"]


def test_an_embedding_is_narrowed_with_the_channels_it_is_added_to() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.scales = nn.Embedding(5, 6), nn.ParameterList([nn.Parameter(torch.rand(6))])
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            logits: Tensor = self.out((self.a(x) + self.embed(ids)) * self.scales[0])
            return logits

    torch.manual_seed(0)
    model = Tokens().eval()
    inputs = torch.tensor([2]), torch.randn(1, 4)
    channels = find_channels(model, inputs)
    assert [g.name for g in channels.groups] == ["a"]
    keep = channels.keep({"a": torch.tensor([0, 4, 5])})
    small = surgery.pruned(model, keep)
    assert small.embed.embedding_dim == 3 and small.scales[0].shape == (3,)
    with torch.no_grad():
        assert torch.allclose(small(*inputs), surgery.masked(model, keep)(*inputs), atol=1e-6)
