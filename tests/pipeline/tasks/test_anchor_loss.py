"""Heads of anchors: the loss is torchvision's, adds up over the classes, and learns what the device decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgewright.edge_runtime.answers.decoders import decoded
from edgewright.edge_runtime.bundle.manifest import DecoderSpec
from edgewright.pipeline.errors import DataError, ModelError
from edgewright.pipeline.metric import Answer
from edgewright.pipeline.tasks.anchor_loss import AnchorLoss
from edgewright.pipeline.tasks.detection import Detection

ANCHORS = tuple(
    (x + 4.0, y + 4.0, width, height)
    for y in range(0, 32, 8)
    for x in range(0, 32, 8)
    for width, height in ((8.0, 8.0), (16.0, 8.0), (14.0, 20.0))
)
SPEC = DecoderSpec("ssd", (32, 32), anchors=ANCHORS, weights=(10.0, 10.0, 5.0, 5.0))
BOXES = torch.tensor(
    [
        [[0, 2.0, 2, 14, 12], [1, 20, 20, 31, 30], [-1, 0, 0, 0, 0]],
        [[1, 0.0, 0, 32, 32], [0, 4, 4, 8, 9], [1, 4, 4, 9, 9]],  # two with the same best anchor
        [[-1, 0.0, 0, 0, 0]] * 3,
    ]
)


def _raw(seed: int = 0) -> Tensor:
    return torch.randn(3, len(ANCHORS), 7, generator=torch.Generator().manual_seed(seed))


def _task(**options: object) -> Detection:
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return Detection({"train": (images, BOXES)}, ["cat", "dog"], **{"size": 32, "decoder": SPEC, **options})  # type: ignore[arg-type]


def _torchvisions(raw: Tensor) -> Tensor:
    """The loss of `torchvision.models.detection.ssd.SSD` for `BOXES`, of the same anchors."""
    from torch import nn
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.ops import box_iou

    anchors = torch.tensor(ANCHORS)
    corners = torch.cat([anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2], dim=1)
    network = SSD(nn.Identity(), DefaultBoxGenerator([[2]]), (32, 32), 3, head=nn.Identity())
    targets, matched = [], []
    for boxes in BOXES:
        real = boxes[boxes[:, 0] >= 0]
        targets.append({"boxes": real[:, 1:], "labels": real[:, 0].long() + 1})
        none = torch.full((len(ANCHORS),), -1)
        matched.append(network.proposal_matcher(box_iou(real[:, 1:], corners)) if len(real) else none)
    heads = {"bbox_regression": raw[..., :4], "cls_logits": raw[..., 4:]}
    losses = network.compute_loss(targets, heads, [corners] * 3, matched)
    return losses["bbox_regression"] + losses["classification"]


def test_the_loss_and_its_gradient_are_those_of_torchvision() -> None:
    ours, theirs = _raw().requires_grad_(), _raw().requires_grad_()
    found, wanted = _task().loss(ours, BOXES), _torchvisions(theirs)
    torch.testing.assert_close(found, wanted)
    found.backward()  # type: ignore[no-untyped-call]
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_box_has_an_anchor_and_background_none() -> None:
    which = AnchorLoss(SPEC).assigned(BOXES)
    assert set(which[0].tolist()) == {-1, 0, 1} and set(which[2].tolist()) == {-1}
    # of two boxes with the same best anchor the last one gets it
    assert set(which[1].tolist()) == {-1, 0, 2}
    assert AnchorLoss(SPEC).parts(_raw(), BOXES[:, :0]).abs().sum() == 0.0, "no box, nothing to weigh background by"


def test_the_losses_of_the_classes_add_up_and_so_do_their_gradients() -> None:
    task, raw, whole = _task(), _raw(1).requires_grad_(), _raw(1).requires_grad_()
    parts = [task.class_loss(raw, BOXES, index) for index in (0, 1)]
    loss = task.loss(whole, BOXES)
    torch.testing.assert_close(sum(parts), loss)
    torch.autograd.backward(parts)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(raw.grad, whole.grad)


def test_the_perfect_head_is_decoded_to_the_boxes_and_judged_perfect() -> None:
    task, boxes = _task(metric="map"), BOXES[[0, 2]]
    loss = AnchorLoss(SPEC)
    which = loss.assigned(boxes)
    own = boxes.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 5))
    label = torch.where(which >= 0, own[..., 0].long() + 1, 0)
    codes = torch.where(which[..., None] >= 0, loss.codes(own[..., 1:]), 0.0)
    raw = torch.cat([codes, 16.0 * torch.nn.functional.one_hot(label, 3)], dim=2)
    assert float(task.loss(raw, boxes)) < 1e-3
    found, _ = decoded(SPEC, raw.numpy())
    torch.testing.assert_close(torch.from_numpy(found)[which >= 0], own[which >= 0][:, 1:])
    assert task.metric.score([Answer(raw, boxes)]).value == pytest.approx(1.0)


class _Told(torch.nn.Module):
    def __init__(self, decoder: object) -> None:
        super().__init__()
        self.box_decoder = decoder


def test_the_decoder_of_a_model_is_read_when_it_is_shown() -> None:
    task = _task(decoder="model", score_threshold=0.4)
    assert task.reads_model and not _task().reads_model
    with pytest.raises(DataError, match="give it the model first"):
        task.loss(_raw(), BOXES)
    said = {"name": "ssd", "size": [32, 32], "anchors": torch.tensor(ANCHORS), "weights": (10, 10, 5, 5)}
    seen = task.for_model(_Told(said))
    assert not seen.reads_model and task.reads_model
    decoder = seen.answers[0].decoder
    assert decoder is not None and decoder.anchors == ANCHORS and decoder.score_threshold == 0.4
    torch.testing.assert_close(seen.loss(_raw(), BOXES), _task().loss(_raw(), BOXES))
    few = seen.of_classes([1])
    assert few.class_names == ("dog",) and few.answers[0].decoder == decoder


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "has no `box_decoder`, which `decoder: model` asks for"),
        (torch.nn.Linear(1, 1), "is no dict of name, size"),
        ({"name": "yolo", "size": (32, 32)}, "one of the names grid, ssd"),
        ({"name": "ssd", "size": (32, 32), "anchors": [[1.0, 2.0, 3.0]]}, "cannot be read"),
        ({"name": "ssd", "size": (32, 32), "anchors": [[4.0, 4.0, 0.0, 8.0]], "weights": (1,) * 4}, "without area"),
        ({"name": "ssd", "size": (32, 32), "anchors": ANCHORS}, "four positive weights"),
        ({"name": "ssd", "size": (16, 32), "anchors": ANCHORS, "weights": (1,) * 4}, "give model and task the same"),
    ],
)
def test_a_decoder_that_says_nothing_useful_is_refused(decoder: object, message: str) -> None:
    with pytest.raises((ModelError, DataError), match=message):
        _task(decoder="model").for_model(_Told(decoder))


def test_a_head_of_another_size_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"returns \[3, 48, 6\].* it is \[samples, 48, 7\]"):
        _task().loss(_raw()[..., 1:], BOXES)
