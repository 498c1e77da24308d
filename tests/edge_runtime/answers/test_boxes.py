"""Boxes: decoders, what overlaps too much, which differences are excused, what `predict` says and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import AnswerSpec, Boxes, BundleError
from edgewright.edge_runtime.answers.boxes import BoxesKind
from edgewright.edge_runtime.answers.decoders import centres, decoded, kept, overlap
from edgewright.edge_runtime.answers.drawing import check_drawn, placed_on, save_drawn
from edgewright.edge_runtime.answers.kind import Meaning
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import DecoderSpec, TensorSpec

GRID = DecoderSpec("grid", (8, 16), (4, 8))
SPEC = AnswerSpec("y", "boxes", ("cat", "dog"), decoder=GRID)
KIND = BoxesKind()
PLACES = 2 * 4 + 1 * 2


def _head(**cells: tuple[float, float, float]) -> np.ndarray:
    """One row: cell -> class, logit, and half of a box's side in strides."""
    raw = np.full((1, PLACES, 6), -8.0, np.float32)
    for name, (label, logit, half) in cells.items():
        raw[0, int(name[1:]), :4] = np.log(np.expm1(half))
        raw[0, int(name[1:]), 4 + int(label)] = logit
    return raw


def test_cells_come_level_by_level_row_by_row() -> None:
    middle, stride = centres(GRID)
    assert middle[:5].tolist() == [[2, 2], [6, 2], [10, 2], [14, 2], [2, 6]] and stride.tolist() == [4] * 8 + [8] * 2
    assert middle[8:].tolist() == [[4, 4], [12, 4]]


def test_a_grid_decodes_to_pixels_inside_the_input() -> None:
    boxes, scores = decoded(GRID, _head(c1=(0, 0.0, 0.5), c9=(1, 2.0, 1.0)))
    np.testing.assert_allclose(boxes[0, 1], [4, 0, 8, 4], atol=1e-5)
    np.testing.assert_allclose(boxes[0, 9], [4, 0, 16, 8], atol=1e-5)  # ends at the edge
    np.testing.assert_allclose(scores[0, [1, 9], [0, 1]], [0.5, 1 / (1 + np.exp(-2.0))], rtol=1e-5)


def test_ssd_decodes_as_torchvision_does() -> None:
    torch = pytest.importorskip("torch")
    from torchvision.models.detection._utils import BoxCoder

    rng = np.random.default_rng(0)
    anchors = np.concatenate([rng.uniform(4, 28, (7, 2)), rng.uniform(2, 9, (7, 2))], axis=1).astype(np.float32)
    raw = rng.normal(size=(1, 7, 4 + 3)).astype(np.float32)
    spec = DecoderSpec("ssd", (1000, 1000), anchors=tuple(map(tuple, anchors.tolist())), weights=(10.0, 10.0, 5.0, 5.0))
    corners = np.concatenate([anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2], axis=1)
    want = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(torch.from_numpy(raw[0, :, :4]), torch.from_numpy(corners))
    boxes, scores = decoded(spec, raw)
    np.testing.assert_allclose(boxes[0], want.clamp(min=0).numpy(), rtol=1e-4, atol=1e-4)
    shares = torch.from_numpy(raw[0, :, 4:]).softmax(dim=1)[:, 1:]
    np.testing.assert_allclose(scores[0], shares.numpy(), rtol=1e-5)


def test_what_is_kept_is_what_torchvision_keeps() -> None:
    torch = pytest.importorskip("torch")
    from torchvision.ops import batched_nms

    rng = np.random.default_rng(1)
    for _ in range(20):
        corner = rng.uniform(0, 20, (30, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(2, 9, (30, 2))], axis=1).astype(np.float32)
        scores = rng.uniform(0, 1, (30, 3)).astype(np.float32)
        place, label = kept(DecoderSpec("grid", (32, 32), (4,), score_threshold=0.3, iou_threshold=0.4), boxes, scores)
        rows, columns = np.nonzero(scores >= 0.3)
        found = batched_nms(
            torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows, columns]), torch.from_numpy(columns), 0.4
        )
        assert list(zip(place.tolist(), label.tolist(), strict=True)) == [
            (int(rows[i]), int(columns[i])) for i in found.tolist()
        ]


def test_equal_scores_are_decided_by_place_and_no_more_than_most_are_kept() -> None:
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12]], np.float32)
    scores = np.full((3, 1), 0.7, np.float32)
    assert kept(GRID, boxes, scores)[0].tolist() == [0, 2]
    assert kept(DecoderSpec("grid", (16, 16), (4,), most=1), boxes, scores)[0].tolist() == [0]
    assert overlap(boxes[:1], np.zeros((1, 4), np.float32)).tolist() == [[0.0]]


def test_an_object_more_is_excused_at_the_threshold_alone() -> None:
    near, far = (_head(c0=(0, 3.0, 0.5), c3=(1, logit, 0.5)) for logit in (-1.0, -1.4))
    # the threshold 0.25 is a logit of -1.0986
    (found,) = KIND.differences(SPEC, {"y": near}, {"y": far}, None, 0.05)
    assert not found.excused and found.margin == pytest.approx(0.0986, abs=1e-3) and found.places == 1
    assert (found.expected, found.got) == (-1, 1)
    (found,) = KIND.differences(SPEC, {"y": near}, {"y": far}, None, 0.1)
    assert found.excused
    assert KIND.differences(SPEC, {"y": near}, {"y": near}, None, 0.0) == []


def test_a_neighbour_with_the_same_box_is_the_same_object() -> None:
    one, two = _head(c8=(0, 2.0, 0.5)), _head(c8=(0, 1.9, 0.5))
    two[0, 0, 4] = 1.95  # another cell wins, with nearly the box of the other
    two[0, 0, :4] = np.log(np.expm1(np.array([0.5, 0.5, 1.5, 1.5])))
    assert (KIND.decisions(SPEC, {"y": one})["label"] != KIND.decisions(SPEC, {"y": two})["label"]).any()
    assert KIND.differences(SPEC, {"y": two}, {"y": one}, None, 0.0) == []
    two[0, 0, :4] = np.log(np.expm1(np.array([0.5, 0.5, 0.5, 0.5])))
    assert KIND.differences(SPEC, {"y": two}, {"y": one}, None, 0.0)


def test_predict_says_and_draws_them_in_pixels_of_the_picture(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    raw = np.concatenate([_head(c1=(0, 3.0, 0.5), c9=(1, 2.0, 0.4)), np.full((1, PLACES, 6), np.nan, np.float32)])
    found = KIND.predict(SPEC, {"y": raw}, {}, Meaning(model="m.onnx"))
    assert isinstance(found, Boxes) and found.rows == 2 and list(found.refused) == [1] and len(found.boxes[1]) == 0
    assert found.label[0].tolist() == [0, 1] and found.size == (8, 16)
    picture = np.zeros((1, 80, 320, 3), np.uint8)
    large = found.placed(80, 320)
    np.testing.assert_allclose(large.boxes[0][0], [80, 0, 160, 40], atol=1e-3)
    assert large.text(0).startswith("cat 0.9526 (80, 0, 160, 40)  dog") and large.data()["label_names"][0] == [
        "cat",
        "dog",
    ]
    assert (
        found._replace(boxes=(found.boxes[1],) * 2, label=(found.label[1],) * 2, score=(found.score[1],) * 2).text(0)
        == "nothing"
    )
    check_drawn([SPEC], tmp_path / "found.png")
    one = found._replace(boxes=found.boxes[:1], label=found.label[:1], score=found.score[:1])
    save_drawn(placed_on({"y": one}, picture), tmp_path / "found.png", picture)
    pixels = np.asarray(images.open(tmp_path / "found.png"))
    assert (
        pixels.shape == (80, 320, 3)
        and pixels[40, 100].any()
        and not pixels[20, 110].any()
        and not pixels[70, 20].any()
    )


@pytest.mark.parametrize(
    ("decoder", "shape", "message"),
    [
        (None, ("batch", PLACES, 6), "names no decoder that this runtime knows"),
        (DecoderSpec("cells", (8, 16), (4, 8)), ("batch", PLACES, 6), r"knows \(grid, ssd\)"),
        (GRID, ("batch", 9, 6), "has 9 places, and its decoder 10"),
        (GRID, ("batch", PLACES, 7), "has 7 numbers at a place, and 2 classes with the decoder grid need 6"),
        (GRID, ("batch", 6), r"boxes are \[N, A, 4 \+ C\]"),
        (DecoderSpec("grid", (8, 16), (4, 8), score_threshold=0.0), ("batch", PLACES, 6), "lie between 0 and 1"),
        (DecoderSpec("grid", (8, 16)), ("batch", PLACES, 6), "a grid has strides"),
        (DecoderSpec("ssd", (8, 16)), ("batch", PLACES, 7), "ssd has anchors"),
    ],
)
def test_a_head_that_the_decoder_does_not_fit_is_refused(
    make_manifest, decoder: DecoderSpec | None, shape: tuple[int | str, ...], message: str
) -> None:
    answers = (AnswerSpec("y", "boxes", SPEC.labels, decoder=decoder),)
    manifest = make_manifest(
        outputs=(TensorSpec("y", "float32", shape),), answers=answers, policy=None, operating_points=(), batch="dynamic"
    )
    with pytest.raises(BundleError, match=message):
        check_consistency(manifest)
    if decoder is GRID and shape == ("batch", PLACES, 6):
        check_consistency(manifest)
