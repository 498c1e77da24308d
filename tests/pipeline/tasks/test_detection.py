"""Detection: which cells learn which box, losses that add up, what is judged, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgewright.edge_runtime.answers.decoders import centres, decoded
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import Answer
from edgewright.pipeline.task import Batch, ShowsClasses, presence
from edgewright.pipeline.tasks.detection import Detection, mirrored
from edgewright.pipeline.tasks.shipped.synthetic_detection import synthetic_detection

BOXES = torch.tensor(
    [
        [[0, 2.0, 2, 14, 12], [1, 20, 20, 31, 30], [-1, 0, 0, 0, 0]],
        [[1, 0.0, 0, 32, 32], [0, 4, 4, 8, 9], [1, 16, 3, 17, 4]],
        [[-1, 0.0, 0, 0, 0]] * 3,
    ]
)


def _task(targets: Tensor = BOXES, **options: object) -> Detection:
    images = torch.randn(len(targets), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return Detection({"train": (images, targets)}, ["cat", "dog"], size=32, strides=(4, 8), **options)  # type: ignore[arg-type]


def _perfect(task: Detection, targets: Tensor) -> Tensor:
    """The head that answers exactly the boxes."""
    (spec,) = task.answers
    assert spec.decoder is not None
    middle, stride = (torch.from_numpy(x) for x in centres(spec.decoder))
    which = task._loss.assigned(targets)
    own = targets.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 5))
    distance = torch.cat([middle - own[..., 1:3], own[..., 3:] - middle], dim=-1) / stride[:, None]
    raw = torch.full((len(targets), len(middle), 6), -12.0)
    raw[..., :4] = torch.expm1(distance.clamp(min=1e-4)).log()
    label = own[..., :1].long().clamp(min=0)
    raw[..., 4:] = torch.full_like(raw[..., 4:], -12.0).scatter(
        2, label, torch.where(which >= 0, 12.0, -12.0)[..., None]
    )
    return raw


def test_every_box_is_learned_by_cells_at_its_middle_of_the_level_of_its_size() -> None:
    task = _task()
    which = task._loss.assigned(BOXES)
    fine = which[:, :64].reshape(3, 8, 8)
    assert (fine[0] == 0).any() and fine[0, 1, 2] == 0 and not (which[2] >= 0).any()
    assert (which[1, 64:] == 0).any() and not (fine[1] == 0).any(), "a box as large as the input is the coarse level's"
    for row in (0, 1):
        real = {i for i, box in enumerate(BOXES[row]) if box[0] >= 0}
        assert set(which[row].tolist()) - {-1} == real, "also the one that no middle lies in"


def test_the_perfect_head_costs_next_to_nothing_and_is_judged_perfect() -> None:
    task, boxes = _task(), BOXES.clone()
    boxes[1, 2] = torch.tensor([-1.0, 0, 0, 0, 0])  # no middle lies in it, so that no head can say it exactly
    raw = _perfect(task, boxes)
    random = torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    assert float(task.loss(raw, boxes)) < 0.05 < 1.0 < float(task.loss(random, boxes))
    score = _task(metric="map").metric.score([Answer(raw[:1], boxes[:1]), Answer(raw[1:], boxes[1:])])
    assert score.value == pytest.approx(1.0) and score.rows == 3
    assert _task(metric="map_50").metric.score([Answer(random - 4, boxes)]).value < 0.2


def test_boxes_of_training_are_those_of_the_device() -> None:
    task = _task()
    (spec,) = task.answers
    raw = torch.randn(2, 80, 6, generator=torch.Generator().manual_seed(0))
    assert spec.decoder is not None
    boxes, _ = decoded(spec.decoder, raw.numpy())
    torch.testing.assert_close(task._loss.boxes(raw).clamp(0, 32), torch.from_numpy(boxes))


def test_the_losses_of_the_classes_add_up() -> None:
    task = _task()
    raw = torch.randn(3, 80, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(task.class_loss(raw, BOXES, 0) + task.class_loss(raw, BOXES, 1), task.loss(raw, BOXES))
    assert isinstance(task, ShowsClasses)
    assert presence(task, BOXES).tolist() == [[True, True], [True, True], [False, False]]


def test_fewer_classes_keep_their_boxes_and_every_sample() -> None:
    few = _task().of_classes([1])
    targets = few.splits["train"].targets
    assert few.class_names == ("dog",) and targets[..., 0].tolist() == [[-1, 0, -1], [0, -1, 0], [-1, -1, -1]]
    assert few.splits["train"].batch([1]).targets[0, 0].tolist() == [0, 0, 0, 32, 32]


def test_mirrored_images_take_their_boxes_along() -> None:
    images = torch.arange(32.0).expand(3, 1, 32, 32)
    turned = mirrored(Batch((images,), BOXES), torch.Generator().manual_seed(0))
    flipped = [bool(x[0, 0, 0] == 31) for x in turned.inputs[0]]
    assert any(flipped) and not all(flipped)
    for row, yes in enumerate(flipped):
        for box, found in zip(BOXES[row], turned.targets[row], strict=True):
            want = [box[0], 32 - box[3], box[2], 32 - box[1], box[4]] if yes and box[0] >= 0 else box.tolist()
            assert found.tolist() == [float(value) for value in want]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 5, 5, 5, 9], r"sample 0: the box .* has no area"),
        ([0, 5, 5, 33, 9], "lies outside the input of 32 x 32 pixels"),
        ([2, 5, 5, 9, 9], "is none of the 2 classes"),
        ([0.5, 5, 5, 9, 9], "is none of the 2 classes"),
    ],
)
def test_a_box_that_cannot_be_is_refused_by_its_sample(box: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _task(torch.tensor([[box]], dtype=torch.float32))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="there are map and map_50"):
        _task(metric="accuracy")
    with pytest.raises(DataError, match=r"strides \[5\] do not divide"):
        Detection({"train": (torch.zeros(1, 1, 32, 32), BOXES[:1])}, ["a", "b"], size=32, strides=(5,))


def test_pages_have_boxes_where_their_characters_are() -> None:
    task = synthetic_detection(rows={"train": 12, "test": 6}, size=32, characters="AX", most=2)
    assert task.splits["train"].targets.shape == (12, 2, 5) and float(task.splits["train"].targets[..., 0].max()) >= 0
    assert task.answers[0].decoder is not None and task.answers[0].decoder.size == (32, 32)
