"""Normalisations of a user's own: pruned where they treat all channels alike, left where they do not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, tiny_task
from torch import Tensor, nn

from edgewright.export import export_bundle
from edgewright.models.layers.channel_norm import ChannelNorm
from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.opening import NORMS, open_layers, reopen
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit, rebuild
from edgewright.pipeline.store.context import FolderContext

X = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))


class Response(nn.Module):
    """ConvNeXt V2's normalisation of responses, channels last."""

    def __init__(self, width: int, last: bool = True) -> None:
        super().__init__()
        shape = (1, 1, 1, width) if last else (1, width, 1, 1)
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.places, self.channels_at = ((1, 2), -1) if last else ((2, 3), 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=self.places, keepdim=True)
        return x + self.scale * (x * size / (size.mean(dim=self.channels_at, keepdim=True) + 1e-6)) + self.shift


class Turned(nn.Module):
    """Adds every channel's neighbour: no normalisation, although it has a number for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * x.roll(1, dims=-1).cumsum(dim=-1) + 0.0 * x.mean(dim=-1, keepdim=True)


class Net(nn.Module):
    def __init__(self, norm: nn.Module, last: bool = True) -> None:
        super().__init__()
        self.wide, self.norm, self.narrow = nn.Conv2d(1, 12, 3, 2, 1), norm, nn.Conv2d(12, 12, 3, 2, 1)
        self.last, self.out = last, nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        logits: Tensor = self.out(torch.relu(self.narrow(x)).mean(dim=(2, 3)))
        return logits


def net(norm: type[nn.Module], last: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(norm(12, last) if norm is Response else norm(12), last).eval()


@pytest.mark.parametrize("last", [True, False])
def test_without_channels_it_is_what_it_is_on_the_others_alone(last: bool) -> None:
    model = net(Response, last)
    expected = model(X)
    assert list(open_layers(model, (X,), NORMS)) == ["norm"] and isinstance(model.norm, ChannelNorm)
    assert torch.equal(model(X), expected)
    channels = find_channels(model, (X,))
    (group,) = [group for group in channels.groups if group.name == "wide"]
    assert set(group.members) == {("wide", "out"), ("norm", "out"), ("narrow", "in")}
    keep = channels.keep({"wide": torch.arange(4, 12)})
    small = surgery.pruned(model, keep)
    assert torch.allclose(small(X), surgery.masked(model, keep)(X), atol=1e-5)
    inner = torch.relu(model.wide(X))[:, 4:]
    alone = Response(8, last)
    for name, parameter in alone._parameters.items():
        assert parameter is not None
        whole = getattr(model.norm, name)
        parameter.data = whole.detach()[..., 4:] if last else whole.detach()[:, 4:]
    inner = alone(inner.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else alone(inner)
    rest = torch.relu(nn.functional.conv2d(inner, model.narrow.weight[:, 4:], model.narrow.bias, 2, 1))
    assert torch.allclose(small(X), model.out(rest.mean(dim=(2, 3))), atol=1e-5)


def test_what_mixes_channels_in_another_way_stays(tmp_path: Path) -> None:
    model = net(Turned)
    assert open_layers(model, (X,), NORMS) == {}
    assert "its channels are mixed" in find_channels(model, (X,)).refused["wide"]


@pytest.mark.slow
def test_the_stage_prunes_it_and_rebuilds_it_from_the_edit(tmp_path: Path) -> None:
    base = net(Response)
    config = ClassAwarePruningConfig(target_mac_reduction=0.5, max_drop=1.0, images_per_class=4, retrain={"epochs": 1})
    result = fit(copy.deepcopy(base), tiny_task(), config, FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] > 0.45 and result.edit.data["opened"] == ["norm"]
    assert result.model.norm.scale.shape[-1] < 12
    again = rebuild(copy.deepcopy(base), result.edit)
    again.load_state_dict(result.model.state_dict())
    rows = tiny_task().splits["test"].batch([0, 1]).inputs
    assert torch.equal(again(*rows), result.model(*rows))
    export_bundle(result.model, tiny_task(), tmp_path / "bundle", parity_rows=16)


def test_reopening_what_is_open_changes_nothing() -> None:
    model = net(Response)
    reopen(model, ["norm"])
    before = model.norm
    reopen(model, ["norm"])
    assert model.norm is before
