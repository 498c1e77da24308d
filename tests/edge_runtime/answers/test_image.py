"""An image a row: what `predict` says and draws, what is no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgewright.edge_runtime import AnswerSpec, BundleError, Restored
from edgewright.edge_runtime.answers.drawing import save_drawn
from edgewright.edge_runtime.answers.image import ImageKind
from edgewright.edge_runtime.answers.kind import Meaning
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import TensorSpec

SPEC = AnswerSpec("y", "image")


def test_what_lies_beyond_black_and_white_is_cut_off_and_drawn(tmp_path: Path) -> None:
    pixels = np.zeros((3, 3, 2, 2), np.float32)
    pixels[0, :, 0, 0] = [1.2, -0.4, 0.5]
    pixels[2, 0, 0, 0] = np.nan
    found = ImageKind().predict(SPEC, {"y": pixels}, {}, Meaning(model="m.onnx"))
    assert isinstance(found, Restored) and list(found.refused) == [2]
    assert found.pixels[0, :, 0, 0].tolist() == [1.0, 0.0, 0.5] and found.text(1).startswith("an image of 2 x 2")
    save_drawn({"y": found}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (2, 6), (255, 0, 128))
    grey = ImageKind().predict(SPEC, {"y": pixels[:2, :1]}, {}, Meaning())
    assert grey.drawn(None).mode == "L" and grey.data()["pixels"][0][0][0] == [1.0, 0.0]


@pytest.mark.parametrize("shape", [("batch", 2, 8, 8), ("batch", 3, 8)])
def test_what_is_no_image_is_refused(make_manifest, shape: tuple[int | str, ...]) -> None:
    outputs = (TensorSpec("y", "float32", shape),)
    manifest = make_manifest(outputs=outputs, answers=(SPEC,), policy=None, operating_points=(), batch="dynamic")
    with pytest.raises(BundleError, match=r"images are \[N, 1 or 3, H, W\]"):
        check_consistency(manifest)
