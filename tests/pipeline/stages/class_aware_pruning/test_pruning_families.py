"""Networks that strangers bring: torchvision's families in small; `benchmarks/pruning_speed.py` runs the large ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pruning_models
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgewright.export import ExportOptions, export_bundle
from edgewright.models import registry
from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.groups import Channels
from edgewright.pipeline.analysis.channels.specialising import class_cut
from edgewright.pipeline.analysis.opening import ATTENTION, open_layers
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit, rebuild
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import SPLITS
from edgewright.pipeline.tasks.image_classification import ImageClassification

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
_FOUND: dict[str, tuple[nn.Module, Channels]] = {}


def found(name: str) -> tuple[nn.Module, Channels]:
    if name not in _FOUND:
        model = pruning_models.lively(pruning_models.FAMILIES[name])
        open_layers(model, (IMAGES[:1],), ATTENTION)
        _FOUND[name] = model, find_channels(model, (IMAGES[:1],), prune_residual=True)
    return _FOUND[name]


@st.composite
def choices(draw: st.DrawFn) -> tuple[float, int]:
    """How much stays, and which: a seed, because hundreds of drawn flags would take longer than the network."""
    return draw(st.floats(0.02, 0.98)), draw(st.integers(0, 2**31))


@pytest.mark.slow
@pytest.mark.parametrize("name", pruning_models.FAMILIES)
@given(choice=choices())
@settings(max_examples=4, deadline=None)
def test_narrowed_equals_masked_in_every_family(name: str, choice: tuple[float, int]) -> None:
    model, channels = found(name)
    share, seed = choice
    generator = torch.Generator().manual_seed(seed)
    kept = {g.name: _some(g.units, share, generator) for g in channels.groups}
    keep = channels.keep(kept)
    small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
    with torch.no_grad():
        whole, expected, narrow = model(IMAGES), dense(IMAGES), small(IMAGES)
    scale = float(expected.abs().max())
    assert 1e-2 < scale < 1e3, "else the bound below says nothing"
    assert float((narrow - expected).abs().max()) <= 1e-5 * max(1.0, scale)
    assert all(len(k) == g.units for k, g in zip(kept.values(), channels.groups, strict=True)) or not torch.allclose(
        whole, expected, atol=1e-3
    ), "removing channels changes the output"


def _some(units: int, share: float, generator: torch.Generator) -> Tensor:
    stays = torch.rand(units, generator=generator) < share
    stays[torch.randint(units, (1,), generator=generator)] = True
    return stays.nonzero().flatten()


def test_whole_heads_of_attention_go() -> None:
    _, channels = found("vit")
    heads = next(g for g in channels.groups if g.name.endswith("layer_0.self_attention.q"))
    assert heads.units == 4 and heads.unit_width == 8 and not heads.residual
    assert heads.members[(heads.name, "out")].tolist() == torch.arange(32).view(4, 8).tolist()
    assert {path.rpartition(".")[2] for path in heads.producers} == {"q", "k", "v"}


def test_whole_heads_of_window_attention_go_with_their_position_biases() -> None:
    _, channels = found("swin")
    heads = next(g for g in channels.groups if g.name == "features.3.0.attn.q")
    assert heads.units == 4 and heads.unit_width == 8
    assert heads.members[("features.3.0.attn.bias_table", "1")].flatten().tolist() == [0, 1, 2, 3]
    cosine = torchvision.models.SwinTransformer(
        [4, 4], 16, [2], [2], [4, 4], num_classes=4, block=torchvision.models.swin_transformer.SwinTransformerBlockV2
    ).eval()
    before = cosine(IMAGES)
    assert list(open_layers(cosine, (IMAGES[:1],), ATTENTION)) == ["features.1.0.attn", "features.1.1.attn"]
    with torch.no_grad():
        assert torch.allclose(cosine(IMAGES), before, atol=1e-5)
    two = next(g for g in find_channels(cosine, (IMAGES[:1],)).groups if g.name == "features.1.0.attn.q")
    assert two.members[("features.1.0.attn.logit_scale", "0")].flatten().tolist() == [0, 1]
    assert "features.1.0.attn.bias_network.2" in two.producers


def test_numbers_of_heads_that_a_module_writes_down_go_along() -> None:
    torch.manual_seed(0)
    args = {"image_size": 16, "patch": 8, "width": 24, "depth": 1, "heads": 3, "hidden": 32, "classes": 4}
    model = registry.build("zoo:vit_small", args, Path()).eval()
    images = torch.randn(2, 3, 16, 16)
    channels = find_channels(model, (images[:1],))
    heads = next(g for g in channels.groups if g.name == "layers.0.attention.q")
    assert heads.members[("layers.0.attention", "heads")].flatten().tolist() == [0, 1, 2]
    keep = surgery.from_json(surgery.to_json(channels.keep({heads.name: torch.tensor([0, 2])})))
    small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
    assert surgery.changed_attributes(model, keep)["layers.0.attention"] == {"heads": 2}
    with torch.no_grad():
        assert torch.allclose(small(images), dense(images), atol=1e-5)
        assert not torch.allclose(small(images), model(images), atol=1e-3)


def test_attention_that_the_model_reaches_into_stays_closed() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x)[0]
            return y.mean(dim=1) * self.attention.in_proj_weight.sum()

    model, x = Reads().eval(), torch.randn(1, 3, 8)
    assert open_layers(model, (x,), ATTENTION) == {} and isinstance(model.attention, nn.MultiheadAttention)
    tied = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    assert list(open_layers(tied.eval(), (x,), ATTENTION, exclude=("layers.0.*",))) == ["layers.1.self_attn"]


@pytest.mark.parametrize("name", ["densenet", "squeezenet", "vit"])
def test_families_are_specialised_to_some_classes(name: str) -> None:
    model = pruning_models.lively(pruning_models.FAMILIES[name])
    small = surgery.pruned(model, class_cut(model, (IMAGES[:1],), (1, 3)))
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), model(IMAGES)[:, [1, 3]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("shufflenet", 0.3), ("swin", 0.3), ("vit", 0.3)])
def test_what_other_pruners_fail_on_prunes_and_exports(name: str, target: float, tmp_path: Path) -> None:
    model = pruning_models.lively(pruning_models.FAMILIES[name])
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % pruning_models.CLASSES)
    labels = [str(i) for i in range(pruning_models.CLASSES)]
    task = ImageClassification(dict.fromkeys(SPLITS, rows), labels)
    config = ClassAwarePruningConfig(
        criterion="l1", target_mac_reduction=target, mode="threshold_only", max_drop=1.0, retrain={"epochs": 0}
    )
    result = fit(model, task, config, FolderContext(tmp_path / "fit"))
    assert target <= result.metrics["mac_reduction"] < target + 0.05
    rebuilt = rebuild(copy.deepcopy(dense), result.edit)
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    open_layers(dense, (IMAGES[:1],), ATTENTION)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(IMAGES), result.model(IMAGES))
        expected = surgery.masked(dense, surgery.from_json(result.edit.data["keep"]))(IMAGES)
        assert torch.allclose(result.model(IMAGES), expected, atol=1e-5)
    options = ExportOptions(batch="single", simplify="none")
    parity = export_bundle(result.model, task, tmp_path / "bundle", options).manifest.parity
    assert parity.max_abs_diff <= 1e-4 and parity.label_agreement == 1.0
