"""Networks that strangers bring: torchvision's families in small; `benchmarks/pruning_speed.py` runs the large ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pruning_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgewright.export import export_bundle
from edgewright.pipeline.context import FolderContext
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit, surgery
from edgewright.pipeline.stages.class_aware_pruning.groups import Channels, find_channels
from edgewright.pipeline.stages.class_aware_pruning.specialising import class_cut
from edgewright.pipeline.task import SPLITS, ImageClassification

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
_FOUND: dict[str, tuple[nn.Module, Channels]] = {}


def found(name: str) -> tuple[nn.Module, Channels]:
    if name not in _FOUND:
        model = pruning_models.lively(pruning_models.FAMILIES[name])
        _FOUND[name] = model, find_channels(model, (IMAGES[:1],), prune_residual=True)
    return _FOUND[name]


@st.composite
def choices(draw: st.DrawFn) -> tuple[float, int]:
    """How much stays, and which: a seed, because hundreds of drawn flags would take longer than the network."""
    return draw(st.floats(0.02, 0.98)), draw(st.integers(0, 2**31))


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


@pytest.mark.parametrize("name", ["densenet", "squeezenet", "vit"])
def test_families_are_specialised_to_some_classes(name: str) -> None:
    model = pruning_models.lively(pruning_models.FAMILIES[name])
    small = surgery.pruned(model, class_cut(model, (IMAGES[:1],), (1, 3)))
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), model(IMAGES)[:, [1, 3]], atol=1e-5)


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
    with torch.no_grad():
        expected = surgery.masked(dense, surgery.from_json(result.edit.data["keep"]))(IMAGES)
        assert torch.allclose(result.model(IMAGES), expected, atol=1e-5)
    parity = export_bundle(result.model, task, tmp_path / "bundle").manifest.parity
    assert parity.max_abs_diff <= 1e-4 and parity.label_agreement == 1.0
