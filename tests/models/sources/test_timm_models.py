"""Models of timm by name: what is built, that nothing is fetched, and what is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgewright.models import registry
from edgewright.models.sources import timm_models
from edgewright.models.sources.weights import load_weights
from edgewright.pipeline.analysis.cost import count

pytest.importorskip("timm")
HERE = Path(__file__).parent
PUBLISHED = {
    # parameters, MACs at 256 px (EdgeNeXt's README and METHODS 9.6.8; theirs count some element-wise work too)
    "edgenext_xx_small": (1.33e6, 261e6),
    "edgenext_x_small": (2.34e6, 538e6),
    "edgenext_small": (5.59e6, 1.26e9),
    "edgenext_base": (18.51e6, 3.84e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_edgenext_costs_what_was_published(name: str) -> None:
    parameters, macs = PUBLISHED[name]
    model = registry.build(f"timm:{name}", {}, HERE)
    cost = count(model, (torch.zeros(1, 3, 256, 256),))
    assert cost.parameters == pytest.approx(parameters, rel=0.005)
    assert 0.97 * macs < cost.macs + cost.attention_macs <= macs
    assert registry.input_shape(f"timm:{name}") == (3, 256, 256)


def test_arguments_and_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was asked for over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    args = {"num_classes": 3, "in_chans": 1}
    torch.manual_seed(0)
    trained = registry.build("timm:mobilenetv3_small_050", args, HERE).eval()
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = registry.build("timm:mobilenetv3_small_050.lamb_in1k", args, HERE).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert trained(x).shape == (2, 3) and not torch.equal(trained(x), other(x))
        load_weights(other, tmp_path / "model.safetensors")
        assert torch.equal(trained(x), other(x))
    with pytest.raises(ValueError, match="do not fit the model"):
        load_weights(registry.build("timm:mobilenetv3_small_050", {}, HERE), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("timm:edgenext_xxsmall", {}, r"timm has no model 'edgenext_xxsmall' \(did you mean 'edgenext_xx_small'"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", {}, "files of the hub are given under model.weights"),
        ("timm:resnet18.a9", {}, r"cannot be built .*Invalid pretrained tag \(a9\)"),
        ("timm:resnet18", {"pretrained": True}, "put a weights file under model.weights"),
        ("timm:resnet18", {"num_clases": 3}, "unexpected keyword argument 'num_clases'"),
        ("edgenext_small", {}, r"did you mean .*'timm:edgenext_small'"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build(name, args, HERE)


def test_a_large_library_is_listed_when_it_is_asked_for() -> None:
    rows = [info for info in registry.available() if info.name.startswith("timm:")]
    assert [row.name for row in rows] == ["timm:..."] and "architectures" in rows[0].description
    asked = {info.name: info for info in registry.available("timm:edgenext")}
    assert set(PUBLISHED) <= {name.removeprefix("timm:") for name in asked}
    assert asked["timm:edgenext_small"].input_shape == (3, 256, 256)
    assert "mean 0.485 0.456 0.406" in asked["timm:edgenext_small"].description


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_models, "_installed", lambda: False)
    with pytest.raises(ValueError, match=r"needs the timm library: pip install 'edgewright\[timm\]'"):
        registry.build("timm:resnet18", {}, HERE)
    assert "pip install 'edgewright[timm]'" in next(i for i in registry.available() if i.name == "timm:...").description
