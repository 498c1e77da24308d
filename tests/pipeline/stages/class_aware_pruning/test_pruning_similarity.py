from __future__ import annotations

import copy
from pathlib import Path

import pruning_models
import pytest
import torch
from tiny import tiny_residual, tiny_task, tiny_transformer
from torch import Tensor, nn

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.flow import Axis
from edgewright.pipeline.analysis.channels.groups import ChannelGroup, Channels
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.stages.class_aware_pruning.criteria import CRITERIA, filter_scores
from edgewright.pipeline.stages.class_aware_pruning.criterion import ScoredLayer
from edgewright.pipeline.stages.class_aware_pruning.feature_maps import Moments, collect_moments, correlations
from edgewright.pipeline.stages.class_aware_pruning.similarity import handed_over
from edgewright.pipeline.store.context import FolderContext

IMAGE = torch.zeros(1, 1, 12, 12)


def measured(
    model: nn.Module, tmp_path: Path, residual: bool = False
) -> tuple[Channels, dict[str, dict[Axis, Moments]]]:
    channels = find_channels(model.eval(), (IMAGE,), residual)
    split = tiny_task().splits["calibration"]
    return channels, collect_moments(model, channels.groups, split, 16, FolderContext(tmp_path))


def scores_of(model: nn.Module, tmp_path: Path, residual: bool = False) -> dict[str, Tensor]:
    channels, moments = measured(model, tmp_path, residual)
    alike = correlations(channels.groups, moments)
    return filter_scores(CRITERIA["similarity"], model, {}, channels.groups, FolderContext(tmp_path), 1, alike)


def repeat(model: nn.Module, conv: str, norm: str | None, source: int, target: int, factor: float = 1.0) -> None:
    """Channel `target` becomes `factor` times channel `source`, behind the normalisation."""
    layer = model.get_submodule(conv)
    scaled = model.get_submodule(norm) if norm else layer
    with torch.no_grad():
        for module in {layer, scaled}:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dim():
                    tensor[target] = tensor[source]
        for tensor in scaled.parameters():
            tensor[target] *= factor


def scattered() -> nn.Module:
    """A residual network whose normalisations know the data and tell channels apart; none is silent."""
    model, generator = tiny_residual(), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(0.0, 0.5, generator=generator)
                module.momentum = None
    with torch.no_grad():
        model.train()(tiny_task().splits["train"].batch(list(range(64))).inputs[0])
    return model.eval()


def kept_without(group: ChannelGroup, unit: int) -> Tensor:
    return torch.tensor([u for u in range(group.units) if u != unit])


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_repeated_channel_is_found_first(factor: float, tmp_path: Path) -> None:
    model = scattered()
    repeat(model, "blocks.1.conv1", "blocks.1.bn1", 3, 9, factor)
    scores = scores_of(model, tmp_path)
    assert int(scores["blocks.1.conv1"].argmin()) in (3, 9)
    assert float(scores["blocks.1.conv1"].min()) < 1e-6
    pair = scores["blocks.1.conv1"][[3, 9]]
    assert float(pair.max()) > 0.1, "one of the two stays"
    assert float(scores["blocks.0.conv1"].min()) > 1e-4, "nothing is repeated there"


def test_of_two_alike_the_one_with_smaller_weights_goes(tmp_path: Path) -> None:
    model = scattered()
    repeat(model, "blocks.1.conv1", "blocks.1.bn1", 3, 9)
    with torch.no_grad():
        model.get_submodule("blocks.1.conv2").weight[:, 3] *= 0.1
    assert int(scores_of(model, tmp_path)["blocks.1.conv1"].argmin()) == 3


def test_a_channel_of_one_number_goes_first_and_stands_in_for_nobody(tmp_path: Path) -> None:
    model = scattered()
    with torch.no_grad():
        model.get_submodule("blocks.0.bn1").weight[5] = 0.0
        model.get_submodule("blocks.0.bn1").bias[5] = 0.7
    scores = scores_of(model, tmp_path)["blocks.0.conv1"]
    assert int(scores.argmin()) == 5 and float(scores[5]) == 0.0


def test_scores_are_those_of_the_moment_of_leaving() -> None:
    generator = torch.Generator().manual_seed(1)
    alike = torch.rand(7, 7, generator=generator, dtype=torch.float64).triu(1)
    alike = alike + alike.T
    energy = torch.rand(7, generator=generator, dtype=torch.float64)
    layer = ScoredLayer("x", nn.Linear(2, 7), None, torch.Generator(), energy, energy, alike)
    found = CRITERIA["similarity"].filter_scores(layer)
    left, wanted = list(range(7)), torch.ones(7, dtype=torch.float64)
    while len(left) > 1:
        value, one, other = max((float(alike[i, j]), i, j) for i in left for j in left if i < j)
        goes = min((one, other), key=lambda i: float(energy[i]))
        wanted[goes] = 1.0 - value
        left.remove(goes)
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("residual", [False, True])
def test_handing_over_a_repeated_channel_changes_nothing(factor: float, residual: bool, tmp_path: Path) -> None:
    model = scattered()
    repeat(model, "blocks.1.conv1", "blocks.1.bn1", 3, 9, factor)
    channels, moments = measured(model, tmp_path, residual)
    group = next(g for g in channels.groups if g.name == "blocks.1.conv1")
    kept = {group.name: kept_without(group, 9)}
    x = tiny_task().splits["test"].batch(list(range(8))).inputs[0]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        whole = model(x)
        plain = surgery.pruned(model, channels.keep(kept))(x)
        handed = surgery.pruned(handed_over(model, channels, kept, moments), channels.keep(kept))(x)
    assert float((handed - whole).abs().max()) < 1e-5 < 1e-2 < float((plain - whole).abs().max())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model is left alone"


def test_what_is_constant_goes_into_the_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0.0, 0.8
        model[1].weight[6], model[1].bias[6] = model[1].weight[4], model[1].bias[4]
    channels, moments = measured(model, tmp_path)
    (group,) = channels.groups
    kept = {group.name: torch.tensor([0, 1, 3, 4, 5, 7])}
    x = torch.randn(8, 1, 12, 12)
    with torch.no_grad():
        small = surgery.pruned(handed_over(model, channels, kept, moments), channels.keep(kept))
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_no_survivor_is_left_alone(tmp_path: Path) -> None:
    model = scattered()
    channels, moments = measured(model, tmp_path)
    same = handed_over(model, channels, {g.name: torch.arange(g.units) for g in channels.groups}, moments)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("build", [pruning_models.Patchwork, pruning_models.GatedUnits, tiny_transformer])
def test_every_kind_of_model_is_compared_and_handed_over(build: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    channels, moments = measured(model, tmp_path, residual=True)
    scores = scores_of(model, tmp_path, residual=True)
    for group in channels.groups:
        for path in group.producers:
            units = scores[path][group.members[(path, "out")]]
            assert bool((units >= 0).all()) and bool(torch.isfinite(units).all())
            assert torch.allclose(units, units[:, :1].expand_as(units)), "the channels of a unit go together"
    kept = {group.name: torch.arange(1, group.units) for group in channels.groups if group.units > 1}
    small = surgery.pruned(handed_over(model, channels, kept, moments), channels.keep(kept))
    with torch.no_grad():
        assert bool(torch.isfinite(small(torch.randn(2, 1, 12, 12))).all())


def test_maps_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = scattered()
    channels = find_channels(model.eval(), (IMAGE,))
    with torch.no_grad():
        model.get_submodule("blocks.0.bn1").bias[0] = torch.inf
    with pytest.raises(StageError, match="NaN or infinite"):
        collect_moments(model, channels.groups, tiny_task().splits["calibration"], 16, FolderContext(tmp_path))
