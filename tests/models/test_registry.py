"""Models by name: what is built, what is refused and how, and that building is deterministic."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from edgewright.models import registry
from edgewright.models.sources.weights import load_weights

HERE = Path(__file__).parent


def test_every_zoo_model_runs_and_is_deterministic() -> None:
    for info in registry.available():
        if not info.name.startswith("zoo:"):
            continue
        assert info.input_shape is not None and info.description
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            models.append(registry.build(info.name, {}, HERE).eval())
        a, b = (model.state_dict() for model in models)
        assert all(torch.equal(a[key], b[key]) for key in a)
        x = torch.randn(2, *info.input_shape)
        with torch.no_grad():
            y = models[0](x)
        assert y.shape[0] == 2 and y.dim() == 2 and torch.isfinite(y).all()
        assert registry.input_shape(info.name) == info.input_shape


def test_torchvision_gives_one_tensor_in_both_modes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("googlenet", "inception_v3"):
            model = registry.build(f"torchvision:{name}", {"num_classes": 3}, HERE)
            x = torch.randn(2, 3, 80, 80)
            assert model.train()(x).shape == (2, 3)
            assert model.eval()(x).shape == (2, 3)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_segmentation_networks_of_torchvision_answer_with_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = registry.build(f"torchvision:{name}", {"num_classes": 3}, HERE)
    x = torch.randn(2, 3, 64, 64)
    assert model.train()(x).shape == model.eval()(x).shape == (2, 3, 64, 64)
    # as published: the library's keys, and of one the auxiliary classifier beside
    trained = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    state = dict(trained.state_dict())
    if name.startswith("deeplab"):
        state["aux_classifier.4.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "published.safetensors")
    loaded = load_weights(model, tmp_path / "published.safetensors")
    assert bool(loaded.unused) == name.startswith("deeplab")
    with torch.no_grad():
        assert torch.equal(model(x), trained(x)["out"])


def test_video_networks_of_torchvision() -> None:
    model = registry.build("torchvision:mc3_18", {"num_classes": 3}, HERE).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 4, 16, 16)).shape == (1, 3)
    rows = {info.name: info for info in registry.available("torchvision:")}
    assert "clips [N, 3, T, H, W]" in rows["torchvision:mc3_18"].description
    assert "a class for each pixel" in rows["torchvision:fcn_resnet50"].description
    assert not any("quantized" in name for name in rows)


def test_torchvision_is_listed_with_its_input_shape() -> None:
    shapes = {info.name: info.input_shape for info in registry.available()}
    assert shapes["torchvision:resnet18"] == (3, 224, 224)
    assert shapes["torchvision:inception_v3"] == (3, 299, 299)
    assert registry.input_shape("torchvision:nothing") is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenet_v3_small", {"num_classes": 3, "width_mult": 0.5, "reduced_tail": True}),
        ("vit_b_32", {"num_classes": 3, "image_size": 64}),
        ("shufflenet_v2_x0_5", {"num_classes": 3}),
        ("efficientnet_b0", {"num_classes": 3, "dropout": 0.1}),
    ],
)
def test_torchvision_arguments_pass_through(name: str, args: dict[str, object]) -> None:
    model = registry.build(f"torchvision:{name}", args, HERE).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("zoo:resnet65", {}, r"unknown model 'zoo:resnet65' \(did you mean 'zoo:resnet56'"),
        ("resnet18", {}, r"unknown model 'resnet18' \(did you mean .*torchvision:resnet18"),
        ("torchvision:resnet19", {}, r"no model 'resnet19' for classification, .* \(did you mean 'resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "has two stages"),
        ("torchvision:quantized_r3d_18", {}, "no model"),
        ("torchvision:fcn_resnet50", {"weights_backbone": "DEFAULT"}, "put a weights file under model.weights"),
        ("zoo:resnet_small", {"clases": 3}, r"zoo:resnet_small has no argument 'clases' \(did you mean 'classes'"),
        ("zoo:resnet_small", {"shortcut": "none"}, "unknown shortcut 'none'"),
        ("zoo:resnet_small", {"inner": [8, 8]}, "needs one entry per stage"),
        ("zoo:vit_small", {"image_size": 33}, "33 is not a multiple of patch 4"),
        ("zoo:vit_small", {"heads": 3}, "width 128 is not a multiple of heads 3"),
        ("torchvision:resnet18", {"classes": 3}, r"no argument 'classes' \(did you mean 'num_classes'"),
        ("torchvision:mobilenet_v3_small", {"num_clases": 3}, "did you mean 'num_classes'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "put a weights file under model.weights"),
        ("torchvision:densenet121", {"growth_rate": 3}, "growth_rate"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build(name, args, HERE)


def test_a_users_model(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, classes: int = 2) -> None:\n"
        "        super().__init__(nn.Flatten(), nn.Linear(4, classes))\n"
        "def fails(): return 1 / 0\n"
        "def wrong(): return {}\n"
    )
    model = registry.build("python:net.py:Net", {"classes": 5}, tmp_path)
    assert isinstance(model, nn.Module) and model(torch.randn(1, 4)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"fails failed in .*net.py, line 5: ZeroDivisionError") as caught:
        registry.build("python:net.py:fails", {}, tmp_path)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ValueError, match=r"returned a dict; a model is a torch.nn.Module"):
        registry.build("python:net.py:wrong", {}, tmp_path)
    with pytest.raises(ValueError, match="no argument 'clases'"):
        registry.build("python:net.py:Net", {"clases": 5}, tmp_path)
    assert registry.sources("python:net.py:Net", tmp_path) == (tmp_path / "net.py",)


def test_sources_of_zoo_models_hold_what_they_import() -> None:
    assert [p.name for p in registry.sources("zoo:vit_small", HERE)] == ["vit.py"]
    assert [p.name for p in registry.sources("zoo:vgg16", HERE)] == ["__init__.py", "residual.py", "vgg.py"]
    assert registry.sources("torchvision:resnet18", HERE) == ()
