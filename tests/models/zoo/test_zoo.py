"""The zoo against METHODS §0.2, and what the demo network promises about its structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.models.registry import build
from edgewright.models.zoo.residual import BasicBlock, PadShortcut
from edgewright.pipeline.analysis.cost import count

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("name", "classes", "macs", "parameters"),
    [
        ("vgg16", 10, 313_463_808, 14_991_946),
        ("vgg19", 100, 398_182_400, 20_086_692),
        ("resnet56", 10, 125_485_696, 853_018),
        ("resnet56", 100, 125_491_456, 858_868),
        ("vggsmall", 10, 616_966_144, 14_031_754),
        ("vggsmall", 100, 617_058_304, 14_124_004),
        ("resnet50_cifar", 100, 1_298_014_208, 23_705_252),
    ],
)
def test_reference_costs(name: str, classes: int, macs: int, parameters: int) -> None:
    cost = count(build(f"zoo:{name}", {"classes": classes}, HERE), (torch.zeros(1, 3, 32, 32),))
    assert (cost.macs, cost.attention_macs, cost.parameters) == (macs, 0, parameters)


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_first_convolutions_of_a_stage_read_one_width(shortcut: str) -> None:
    model = build("zoo:resnet_small", {"shortcut": shortcut}, HERE)
    for index, width in enumerate((16, 32, 64)):
        stage = model.get_submodule(f"stages.stage{index}")
        blocks = [module for module in stage.modules() if isinstance(module, BasicBlock)]
        assert len(blocks) == 3
        assert {block.conv1.in_channels for block in blocks} == {width}
        assert {block.conv1.out_channels for block in blocks} == {2 * width}
        assert {block.conv2.out_channels for block in blocks} == {width}


def test_the_small_network_is_large_enough_to_compress() -> None:
    x = (torch.zeros(1, 1, 32, 32),)
    cost = count(build("zoo:resnet_small", {}, HERE), x)
    assert 15e6 < cost.macs < 40e6
    inner = sum(c.macs for p, c in cost.per_module.items() if p.endswith(("conv1", "conv2")))
    assert inner > 0.95 * cost.macs
    half = count(build("zoo:resnet_small", {"width_factor": 0.5}, HERE), x)
    assert 3.5 < cost.macs / half.macs < 4.5


@pytest.mark.parametrize("args", [{"in_channels": 3, "classes": 7, "blocks": 1, "inner": [4, 8, 8], "stem_stride": 1}])
def test_arguments_of_the_small_network(args: dict[str, Any]) -> None:
    model = build("zoo:resnet_small", args, HERE).eval()
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 7)
    assert model.get_submodule("stages.stage2.block0.conv1").weight.shape == (8, 64, 3, 3)


def test_pad_shortcut_fills_both_sides_with_zeros() -> None:
    x = torch.randn(2, 3, 5, 5)
    y = PadShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == 0 and y[:, 5:].abs().sum() == 0


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_rows_of_the_vision_transformer_do_not_influence_each_other(pool: str) -> None:
    args = {"image_size": 12, "patch": 4, "width": 16, "depth": 2, "heads": 2, "pool": pool, "in_channels": 1}
    model = build("zoo:vit_small", args, HERE).eval()
    x = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-6)
