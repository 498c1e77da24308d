"""From the raw head of a detector to boxes: decoders by name, and what overlaps too much goes. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import DecoderSpec

BOX = 4
"""Numbers of a box before those of the classes."""


def places(spec: DecoderSpec) -> int | None:
    """How many boxes a head of this decoder gives; None if any number."""
    if spec.name == "grid":
        height, width = spec.size
        return sum((height // stride) * (width // stride) for stride in spec.strides)
    return len(spec.anchors)


def centres(spec: DecoderSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the cells of a `grid`: middles [A, 2] as (x, y) in pixels, and the stride of each [A].

    Level by level in the order of the strides, each row by row.
    """
    middles, strides = [], []
    for stride in spec.strides:
        down, across = (np.arange(side // stride, dtype=np.float32) for side in spec.size)
        y, x = np.meshgrid(down, across, indexing="ij")
        middles.append((np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride)
        strides.append(np.full(x.size, stride, np.float32))
    return np.concatenate(middles), np.concatenate(strides)


def decoded(spec: DecoderSpec, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes and scores of a raw head.

    Args:
        spec: says how.
        raw: [N, A, 4 + C], with background before the classes for ``ssd``.

    Returns:
        Boxes [N, A, 4] as left, top, right, bottom in pixels of the model's input, inside it, and scores [N, A, C].
    """
    boxes, scores = DECODERS[spec.name](spec, raw.astype(np.float32, copy=False))
    height, width = spec.size
    return np.clip(boxes, 0.0, np.array([width, height, width, height], np.float32)), scores


def _grid(spec: DecoderSpec, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distances to the four sides from the middle of each cell: the softplus of a number, in units of the stride."""
    middle, stride = centres(spec)
    distance = np.logaddexp(raw[..., :BOX], 0.0) * stride[:, None]
    boxes = np.concatenate([middle - distance[..., :2], middle + distance[..., 2:]], axis=-1)
    return boxes.astype(np.float32), _sigmoid(raw[..., BOX:])


def _ssd(spec: DecoderSpec, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Offsets of anchors (middle x, middle y, width, height), divided by weights; a softmax with background first."""
    anchors = np.asarray(spec.anchors, np.float32)
    codes = raw[..., :BOX] / np.asarray(spec.weights, np.float32)
    middle = codes[..., :2] * anchors[:, 2:] + anchors[:, :2]
    # what torchvision allows an exponent to be
    half = np.exp(np.minimum(codes[..., 2:], np.log(1000.0 / 16))) * anchors[:, 2:] / 2
    logits = raw[..., BOX:]
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    boxes = np.concatenate([middle - half, middle + half], axis=-1)
    return boxes.astype(np.float32), shares[..., 1:].astype(np.float32)


DECODERS: Mapping[
    str, Callable[[DecoderSpec, NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
] = {"grid": _grid, "ssd": _ssd}
"""Every decoder by name."""


def kept(
    spec: DecoderSpec, boxes: NDArray[np.float32], scores: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is answered of one row: boxes above the score threshold, of those of one class that overlap the best.

    Equal scores are decided by the place in the head, then by the class.

    Args:
        spec: thresholds, and how many boxes at most.
        boxes: [A, 4].
        scores: [A, C].

    Returns:
        Places and classes [K], the highest score first.
    """
    place, label = np.nonzero(scores >= np.float32(spec.score_threshold))
    order = np.lexsort((label, place, -scores[place, label]))
    place, label = place[order], label[order]
    chosen: list[int] = []
    alive = np.ones(len(place), bool)
    for at in range(len(place)):
        if not alive[at]:
            continue
        chosen.append(at)
        if len(chosen) == spec.most:
            break
        rivals = alive & (label == label[at])
        rivals[: at + 1] = False
        others = np.flatnonzero(rivals)
        over = overlap(boxes[place[at]][None], boxes[place[others]])[0] > spec.iou_threshold
        alive[others[over]] = False
    return place[chosen].astype(np.int64), label[chosen].astype(np.int64)


def overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection over union [K, L] of boxes [K, 4] and [L, 4]; 0 where both are empty."""
    a, b = one[:, None].astype(np.float64), other[None].astype(np.float64)
    inside = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0, None).prod(axis=-1)
    areas = [np.clip(x[..., 2:] - x[..., :2], 0.0, None).prod(axis=-1) for x in (a, b)]
    union = areas[0] + areas[1] - inside
    found: NDArray[np.float64] = np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
    return found


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)
