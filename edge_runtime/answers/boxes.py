"""Objects with their places: the kind ``boxes``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, DecoderSpec, TensorSpec
from ..errors import InputError
from ..process.plain_text import printable
from .class_map import palette
from .decoders import BOX, DECODERS, decoded, kept, overlap, places
from .kind import LABEL_DIFFERS, Difference, Kind, Meaning, Outputs, label_name, with_overflown

if TYPE_CHECKING:
    from PIL import Image

BOXES = "boxes"

_SAME = 0.9  # overlap from which two boxes of one class are the same object
_NEAR = 1e-3  # of the overlap to its threshold, where rounding decides which of two boxes goes
_SHOWN = 8


class Boxes(NamedTuple):
    """Objects of every row, the surest first; of the kind ``boxes``.

    Attributes:
        boxes: per row float32 [K, 4], left, top, right, bottom in pixels: of the pictures where those were given as
            pixels, else of the model's input. None in a row that was refused.
        label: per row int64 [K].
        score: per row float32 [K], the probability of the class.
        labels: names of the classes, empty if the manifest has none.
        size: (height, width) that the pixels count.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    boxes: tuple[NDArray[np.float32], ...]
    label: tuple[NDArray[np.int64], ...]
    score: tuple[NDArray[np.float32], ...]
    labels: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.boxes)

    def placed(self, height: int, width: int) -> Boxes:
        """The same in pixels of pictures that were resized to `size`."""
        scale = np.array([width, height, width, height], np.float32) / np.array([*self.size[::-1]] * 2, np.float32)
        boxes = tuple((boxes * scale).astype(np.float32) for boxes in self.boxes)
        return self._replace(boxes=boxes, size=(height, width))

    def text(self, row: int) -> str:
        """The surest objects."""
        shown = [
            f"{printable(label_name(int(label), self.labels))} {float(score):.4f} "
            f"({', '.join(f'{float(side):.0f}' for side in box)})"
            for box, label, score in zip(self.boxes[row], self.label[row], self.score[row], strict=True)
        ]
        more = f"  and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return "  ".join(shown[:_SHOWN]) + more if shown else "nothing"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "boxes": [boxes.tolist() for boxes in self.boxes],
            "label": [label.tolist() for label in self.label],
            "label_names": [[label_name(int(i), self.labels) for i in label] for label in self.label],
            "score": [score.tolist() for score in self.score],
            "labels": list(self.labels),
            "size": list(self.size),
        }

    def drawn(self, pictures: NDArray[np.uint8] | None) -> Image.Image:
        """The pictures below each other with their boxes.

        Raises:
            InputError: there are no pictures, an .npy was given.
        """
        from PIL import Image, ImageDraw

        if pictures is None:
            raise InputError("boxes are drawn on the picture that was given, and an array is none: give an image file")
        made = []
        height, width = pictures.shape[1:3]
        for row, picture in enumerate(pictures):
            image = Image.fromarray(np.broadcast_to(picture, (height, width, 3)).copy())
            pencil = ImageDraw.Draw(image)
            for box, label, score in zip(*self.placed(height, width)._of(row), strict=True):
                colour = tuple(palette()[1 + int(label) % 254].tolist())
                pencil.rectangle(box.tolist(), outline=colour, width=max(1, max(height, width) // 320))
                said = f"{label_name(int(label), self.labels)} {float(score):.2f}"
                pencil.text((float(box[0]) + 2, float(box[1]) + 1), said, colour)
            made.append(np.asarray(image))
        return Image.fromarray(np.concatenate(made))

    def _of(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        return self.boxes[row], self.label[row], self.score[row]


class BoxesKind(Kind):
    """The raw head of a detector [N, A, 4 + C], and how it is decoded.

    Its numbers are compared as they are; its objects one to one, by class and overlap.
    """

    name = BOXES
    decides = True
    draws = True
    class_axis = -1
    before_classes = BOX

    def first_class(self, spec: AnswerSpec) -> int:
        """Behind the box, and with `ssd` behind the background, which stays whatever classes go."""
        return BOX + (spec.decoder is not None and spec.decoder.name == "ssd")

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """Of every place its class and 1, int64 [N, A]; 0 where nothing is answered."""
        found = np.zeros(outputs[spec.name].shape[:2], np.int64)
        for row, (_, _, place, label) in enumerate(_objects(spec, outputs[spec.name])):
            found[row, place] = label + 1
        return {LABEL_DIFFERS: found}

    def differences(
        self, spec: AnswerSpec, got: Outputs, want: Outputs, margin: NDArray[Any] | None, flip_margin: float
    ) -> list[Difference]:
        """Objects that only one of both answers has, one `Difference` a row.

        One is excused if its score lies at the threshold, or if it was chosen between boxes that are as good: `margin`
        is of the scores' logits, like `flip_margin`.
        """
        del margin
        found = []
        pairs = zip(_objects(spec, got[spec.name]), _objects(spec, want[spec.name]), strict=True)
        for row, (ours, theirs) in enumerate(pairs):
            alone = _unmatched(ours, theirs)
            if not any(map(len, alone)):
                continue
            margins = [
                _margin(spec, mine, other, at)
                for mine, other, which in ((ours, theirs, alone[0]), (theirs, ours, alone[1]))
                for at in which
            ]
            gone, new = (
                int(side[3][which[0]]) if which else -1 for side, which in ((theirs, alone[1]), (ours, alone[0]))
            )
            widest = max(margins)
            found.append(Difference(LABEL_DIFFERS, row, gone, new, widest, widest <= flip_margin, len(margins)))
        return found

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Boxes:
        """Boxes in pixels of the model's input."""
        raw = outputs[spec.name].astype(np.float32, copy=False)
        refused = with_overflown(raw, refused, meaning)
        found = _objects(spec, np.where(np.isfinite(raw), raw, np.float32(-1e4)))
        none = np.zeros(0, np.int64)
        parts = [
            (boxes[:0], none, scores[:0, 0]) if row in refused else (boxes[place], label, scores[place, label])
            for row, (boxes, scores, place, label) in enumerate(found)
        ]
        assert spec.decoder is not None
        boxes, labels, scores = (tuple(column) for column in zip(*parts, strict=True)) if parts else ((), (), ())
        return Boxes(boxes, labels, scores, spec.labels, spec.decoder.size, refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """No decoder or an unknown one, or a head that is not its."""
        tensor, decoder = tensors[spec.name], spec.decoder
        if decoder is None or decoder.name not in DECODERS:
            known = ", ".join(DECODERS)
            return f"the answer {spec.name!r} ({self.name}) names no decoder that this runtime knows ({known})"
        if reason := senseless(decoder):
            return f"the decoder of {spec.name!r}: {reason}"
        if len(tensor.shape) != 3:
            return f"the output {spec.name!r} has the shape {list(tensor.shape)}, and {self.name} are [N, A, 4 + C]"
        count = places(decoder)
        if isinstance(tensor.shape[1], int) and count != tensor.shape[1]:
            return f"the output {spec.name!r} has {tensor.shape[1]} places, and its decoder {count}"
        wanted = BOX + len(spec.labels) + (decoder.name == "ssd")
        if spec.labels and isinstance(tensor.shape[2], int) and tensor.shape[2] != wanted:
            return (
                f"the output {spec.name!r} has {tensor.shape[2]} numbers at a place, and {len(spec.labels)} classes "
                f"with the decoder {decoder.name} need {wanted}"
            )
        return super().unfit(spec, tensors)


_Objects = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]
"""Of a row: all boxes [A, 4], all scores [A, C], and places and classes [K] of what is answered."""


def _objects(spec: AnswerSpec, raw: NDArray[np.float32]) -> list[_Objects]:
    assert spec.decoder is not None
    every = zip(*decoded(spec.decoder, raw), strict=True)
    return [(boxes, scores, *kept(spec.decoder, boxes, scores)) for boxes, scores in every]


def _unmatched(ours: _Objects, theirs: _Objects) -> tuple[list[int], list[int]]:
    """Which objects of either have no partner: of the same class, overlapping most."""
    shared = overlap(ours[0][ours[2]], theirs[0][theirs[2]])
    shared[ours[3][:, None] != theirs[3][None]] = 0.0
    mine, other = set(range(len(ours[2]))), set(range(len(theirs[2])))
    for flat in np.argsort(-shared, axis=None, kind="stable").tolist():
        one, two = divmod(flat, max(1, shared.shape[1]))
        if shared[one, two] < _SAME:
            break
        if one in mine and two in other:
            mine.discard(one)
            other.discard(two)
    return sorted(mine), sorted(other)


def _margin(spec: AnswerSpec, mine: _Objects, other: _Objects, at: int) -> float:
    """How far the logits would have to move for this object to be in neither answer, or in both."""
    decoder = spec.decoder
    assert decoder is not None
    boxes, scores, place, label = mine
    score = float(scores[place[at], label[at]])
    margins = [abs(_logit(score) - _logit(decoder.score_threshold))]
    same = other[3] == label[at]
    shared = overlap(boxes[place[at]][None], other[0][other[2]])[0]
    for rival in np.flatnonzero(same & (shared > decoder.iou_threshold - _NEAR)).tolist():
        close = abs(shared[rival] - decoder.iou_threshold) <= _NEAR
        taken = float(other[1][other[2][rival], label[at]])
        margins.append(0.0 if close else abs(_logit(score) - _logit(taken)) / 2)
    return min(margins)


def _logit(score: float) -> float:
    score = min(max(score, 1e-7), 1 - 1e-7)
    return float(np.log(score / (1 - score)))


def senseless(decoder: DecoderSpec) -> str | None:
    """What is wrong with a decoder's numbers; None if nothing is."""
    if min(decoder.size) < 1 or not 0 < decoder.score_threshold < 1 or not 0 < decoder.iou_threshold <= 1:
        return "its size is positive, its thresholds lie between 0 and 1"
    if decoder.most < 1:
        return "it answers at least one box"
    if decoder.name == "grid" and (not decoder.strides or min(decoder.strides) < 1):
        return "a grid has strides"
    if decoder.name == "ssd" and (not decoder.anchors or len(decoder.weights) != BOX or min(decoder.weights) <= 0):
        return "ssd has anchors, and four positive weights"
    return None
