from __future__ import annotations

import copy

import pruning_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.groups import ChannelGroup, Channels
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.errors import CheckpointError, StageError

IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(5))
CASES = [(name, residual) for name in pruning_models.MODELS for residual in (False, True)]
_FOUND: dict[tuple[str, bool], tuple[nn.Module, Channels]] = {}


def found(name: str, residual: bool) -> tuple[nn.Module, Channels]:
    if (name, residual) not in _FOUND:
        model = pruning_models.MODELS[name]()
        _FOUND[(name, residual)] = model, find_channels(model, (IMAGES[:1],), residual)
    return _FOUND[(name, residual)]


def producers(channels: Channels) -> dict[str, tuple[str, ...]]:
    return {g.name: g.producers for g in channels.groups}


def test_residual_streams_are_left_alone_by_default() -> None:
    _, channels = found("residual", False)
    assert [g.name for g in channels.groups] == ["blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"]
    assert {g.units for g in channels.groups} == {16}
    assert "residual" in channels.refused["stem.0"]
    assert "output" in channels.refused["fc"]


def test_residual_stream_is_one_group_when_asked_for() -> None:
    _, channels = found("residual", True)
    stream = next(g for g in channels.groups if g.residual)
    assert stream.producers == ("stem.0", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2")
    assert ("fc", "in") in stream.members and ("stem.1", "out") in stream.members
    assert set(channels.refused) == {"fc"}


def test_transformer_gives_its_hidden_units_and_keeps_attention() -> None:
    _, channels = found("transformer", False)
    assert [g.name for g in channels.groups] == [f"layers.{i}.up" for i in range(3)]
    assert {"q", "k", "v"} <= {path.rpartition(".")[2] for path in channels.refused}


def test_gates_are_no_residual_streams() -> None:
    _, channels = found("gated", False)
    assert producers(channels) == {"gate": ("gate", "up")}
    assert "mixed" in channels.refused["down"], "the model's own norm mixes the stream"


def test_coupled_layers_of_the_patchwork() -> None:
    _, channels = found("patchwork", False)
    groups = {g.name: g for g in channels.groups}
    assert groups["expand.0"].producers == ("expand.0", "excite")
    # a depthwise convolution with two filters per channel: the unit has both
    assert groups["expand.0"].members[("depthwise.0", "out")].shape == (12, 2)
    # whole groups of the grouped convolution, with the filters that feed them
    assert groups["right.0"].producers == ("right.0", "right.2") and groups["right.0"].units == 3
    assert groups["left"].members[("scale", "0")].flatten().tolist() == list(range(10))
    assert groups["left"].members[("merge.2", "in")].flatten().tolist() == list(range(10))
    # flatten: 9 columns per channel
    assert groups["merge.2"].members[("hidden.0", "in")][1].tolist() == list(range(9, 18))
    assert set(channels.refused) == {"fc"}


def test_widths_written_into_forward_are_found_by_running() -> None:
    _, channels = found("written_width", False)
    assert [g.name for g in channels.groups] == ["a", "d"]
    assert "does not run with fewer" in channels.refused["b"]
    assert "c" in channels.refused


def test_model_is_unchanged_by_tracing() -> None:
    model = pruning_models.MODELS["patchwork"]().train()
    before = copy.deepcopy(model.state_dict())
    find_channels(model, (IMAGES[:1],))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_shared_weights_are_cut_once_and_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(12, 8)
            self.b.weight = self.a.weight
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, 0].mean(dim=1)
            logits: Tensor = self.out(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], dim=1))
            return logits

    model = Tied().eval()
    channels = find_channels(model, (IMAGES[:1],))
    assert producers(channels) == {"a": ("a", "b")}
    small = surgery.pruned(model, channels.keep({"a": torch.tensor([0, 2, 5])}))
    assert small.a.weight is small.b.weight and small.a.weight.shape == (3, 12)
    assert small.out.in_features == 6


def test_parametrized_and_uncalled_layers_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 4))
    nn.utils.parametrizations.spectral_norm(model[2])
    model[0].register_module("unused", nn.Linear(2, 2))
    channels = find_channels(model.eval(), (IMAGES[:1],))
    assert "parametriz" in channels.refused["2"]
    assert "does not call" in channels.refused["0.unused"]


def test_model_that_does_not_run_is_refused_with_the_reason() -> None:
    with pytest.raises(StageError, match="forward failed on inputs of shapes"):
        find_channels(nn.Conv2d(3, 4, 3), (IMAGES[:1],))


@pytest.mark.parametrize(("name", "residual"), CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_narrowed_equals_masked_for_any_choice(name: str, residual: bool, data: st.DataObject) -> None:
    model, channels = found(name, residual)
    kept = {g.name: data.draw(_choice(g), label=g.name) for g in channels.groups}
    keep = channels.keep(kept)
    small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), dense(IMAGES), atol=1e-5, rtol=0)
    narrowed = channels.narrowed(kept)
    modules = dict(small.named_modules())
    for g in narrowed.groups:
        assert g.units == len(kept[g.name])
    for path in narrowed.calls:
        if "in" in {s for p, s in narrowed.widths if p == path}:
            layer = modules[path]
            assert narrowed.widths[(path, "out")] == getattr(
                layer, "out_channels", getattr(layer, "out_features", None)
            )
            assert narrowed.widths[(path, "in")] == getattr(layer, "in_channels", getattr(layer, "in_features", None))


def _choice(group: ChannelGroup) -> st.SearchStrategy[Tensor]:
    chosen = st.lists(st.booleans(), min_size=group.units, max_size=group.units).filter(any)
    return chosen.map(lambda flags: torch.tensor(flags).nonzero().flatten())


@pytest.mark.parametrize("name", pruning_models.MODELS)
def test_two_cuts_compose_and_survive_json(name: str) -> None:
    model, channels = found(name, True)
    first = {g.name: torch.arange(0, g.units, 2) for g in channels.groups}
    after = channels.narrowed(first)
    second = {g.name: torch.arange(g.units - g.units // 3) for g in after.groups}
    twice = surgery.pruned(surgery.pruned(model, channels.keep(first)), after.keep(second))
    whole = surgery.compose(channels.keep(first), after.keep(second))
    once = surgery.pruned(model, surgery.from_json(surgery.to_json(whole)))
    assert {k: v.shape for k, v in once.state_dict().items()} == {k: v.shape for k, v in twice.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(once(IMAGES), twice(IMAGES))


def test_macs_are_predicted_exactly() -> None:
    for name in pruning_models.MODELS:
        model, channels = found(name, True)
        fixed = count(model, (IMAGES[:1],)).macs - channels.macs({})
        previous = count(model, (IMAGES[:1],)).macs
        for share in (0.25, 0.5, 0.75):
            gone = {g.name: int(share * g.units) for g in channels.groups}
            kept = {g.name: torch.arange(g.units - gone[g.name]) for g in channels.groups}
            macs = count(surgery.pruned(model, channels.keep(kept)), (IMAGES[:1],)).macs
            assert macs == channels.macs(gone) + fixed
            assert macs < previous
            previous = macs


def test_edit_for_another_model_is_refused() -> None:
    model, channels = found("residual", False)
    keep = channels.keep({channels.groups[0].name: torch.arange(8)})
    with pytest.raises(CheckpointError, match="does not have"):
        surgery.pruned(nn.Linear(2, 2), keep)
    keep["blocks.0.conv1"]["out"] = torch.tensor([99])
    with pytest.raises(CheckpointError, match="made for another model"):
        surgery.pruned(model, keep)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_groups_agree_with_torch_pruning(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None).eval()
    image = torch.randn(1, 3, 32, 32)
    ours = {frozenset(g.producers) for g in find_channels(model, (image,), prune_residual=True).groups}
    graph = tp.DependencyGraph().build_dependency(model, image, verbose=False)
    theirs = set()
    for group in graph.get_all_groups(ignored_layers=[list(model.modules())[-1]]):
        out = {
            graph._module2name[dep.target.module]
            for dep, _ in group
            if graph.is_out_channel_pruning_fn(dep.handler) and isinstance(dep.target.module, (nn.Conv2d, nn.Linear))
        }
        theirs.add(frozenset(p for p in out if getattr(model.get_submodule(p), "groups", 1) == 1))
    assert ours == theirs


def test_subclasses_with_a_forward_of_their_own() -> None:
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"))

    class LastAxis(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    class Permute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(1, -1)

    torch.manual_seed(0)
    model = nn.Sequential(
        Padded(1, 6, 3), ChannelsFirst(6), nn.GELU(), Padded(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3), nn.ReLU(),
        Permute(), LastAxis(9, 5, 1), nn.Flatten(), nn.Linear(500, 4),
    ).eval()  # fmt: skip
    channels = find_channels(model, (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["0", "3"]
    assert "its forward is its own" in channels.refused["8"]
    kept = {"0": torch.tensor([0, 4, 5]), "3": torch.tensor([1, 2, 6])}
    keep = channels.keep(kept)
    with torch.no_grad():
        small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
        assert torch.allclose(small(IMAGES), dense(IMAGES), atol=1e-5)
    assert small[1].normalized_shape == (3,)


def test_noise_in_eval_mode_does_not_matter() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.rand(1)

    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4), Noisy()).eval()
    assert [g.name for g in find_channels(model, (IMAGES[:1],)).groups] == ["1"]
