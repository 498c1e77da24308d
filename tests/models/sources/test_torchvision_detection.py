"""Detection networks of torchvision: the raw head and the anchors are the library's own, two stages are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewright.edge_runtime.answers.decoders import decoded
from edgewright.models import registry
from edgewright.pipeline.tasks.model_decoder import decoder_of

HERE = Path(__file__).parent
SSDLITE = "torchvision:ssdlite320_mobilenet_v3_large"


def _built(name: str, **args: object) -> Any:
    torch.manual_seed(0)
    return registry.build(name, args, HERE).eval()


def test_what_is_decoded_is_what_the_library_answers() -> None:
    model = _built(SSDLITE, classes=3)
    image = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model((image - 0.5) / 0.5)
        (wanted,) = model.model([image[0]])  # normalises by itself
    spec = decoder_of(model)
    assert raw.shape == (1, 3234, 8) and len(spec.anchors) == 3234 and spec.size == (320, 320)
    boxes, scores = decoded(spec, raw.numpy())
    places = [np.abs(boxes[0] - box).sum(axis=1).argmin() for box in wanted["boxes"].numpy()[:20]]
    torch.testing.assert_close(torch.from_numpy(boxes[0][places]), wanted["boxes"][:20], atol=1e-3, rtol=1e-4)
    found = scores[0][places, wanted["labels"].numpy()[:20] - 1]
    torch.testing.assert_close(torch.from_numpy(found), wanted["scores"][:20], atol=1e-5, rtol=1e-4)


def test_published_weights_lie_under_the_names_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from edgewright.models.sources.weights import load_weights

    trained, other = _built(SSDLITE, classes=2, size=64), registry.build(SSDLITE, {"classes": 2, "size": 64}, HERE)
    state: dict[str, Tensor] = trained.model.state_dict()
    save_file(state, tmp_path / "ssdlite.safetensors")
    load_weights(other, tmp_path / "ssdlite.safetensors")
    for name, value in other.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


@pytest.mark.parametrize("size", [64, [96, 128]])
def test_the_anchors_go_with_the_size(size: int | list[int]) -> None:
    model = _built(SSDLITE, classes=1, size=size)
    spec = decoder_of(model)
    with torch.no_grad():
        raw = model(torch.zeros(2, 3, *spec.size))
    assert raw.shape == (2, len(spec.anchors), 6)
    middles = np.asarray(spec.anchors)[:, :2]
    assert (middles > 0).all() and (middles < np.asarray(spec.size[::-1])).all()
    assert len(np.unique(middles[:, 0])) >= spec.size[1] // 16
    assert registry.input_shape(SSDLITE) == (3, 320, 320)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {}, "has two stages: how many boxes .* depends on values"),
        ("maskrcnn_resnet50_fpn_v2", {"classes": 2}, "has two stages"),
        ("keypointrcnn_resnet50_fpn", {}, "has two stages"),
        ("retinanet_resnet50_fpn", {"classes": 2}, "scores each class of an anchor by itself"),
        ("fcos_resnet50_fpn", {"classes": 2}, "multiplies its scores by a centre-ness"),
        ("ssdlite320_mobilenet_v3_large", {}, "needs `classes`, how many there are without background"),
        ("ssdlite320_mobilenet_v3_large", {"classes": 2, "num_classes": 3}, "no argument 'num_classes'"),
        ("ssdlite320_mobilenet_v3_large", {"classes": 2, "size": [64]}, "give a side in pixels, or"),
        ("ssd300_vgg16", {"classes": 2, "weights": "DEFAULT"}, "put a weights file under model.weights"),
        ("ssdlite_mobilenet", {}, "torchvision has no model 'ssdlite_mobilenet'"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build(f"torchvision:{name}", args, HERE)


@pytest.mark.slow
def test_ssd300_has_the_anchors_of_its_name_and_refuses_sizes_that_its_layers_do_not_fit_on() -> None:
    spec = decoder_of(_built("torchvision:ssd300_vgg16", classes=1))
    assert len(spec.anchors) == 8732 and spec.size == (300, 300)
    with pytest.raises(ValueError, match="its layers do not fit on images of 64 x 64"):
        _built("torchvision:ssd300_vgg16", classes=1, size=64)
