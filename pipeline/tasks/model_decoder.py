"""The decoder that a detection network brings along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgewright.edge_runtime.answers.decoders import BOX, DECODERS
from edgewright.edge_runtime.bundle.manifest import DecoderSpec

from ..errors import ModelError

_FIELDS = ("name", "size", "strides", "anchors", "weights")


def decoder_of(model: nn.Module) -> DecoderSpec:
    """What `model.box_decoder` says of its raw head: a `DecoderSpec`, or a mapping with the names of its fields.

    Of ``ssd``: ``{"name": "ssd", "size": (height, width), "anchors": [A, 4], "weights": (10, 10, 5, 5)}`` with anchors
    as middle x, middle y, width and height in pixels; of ``grid``: name, size and strides.

    Raises:
        ModelError: there is none, or it is none of these.
    """
    found, what = getattr(model, "box_decoder", None), f"the model {type(model).__name__}"
    if found is None:
        raise ModelError(
            f"{what} has no `box_decoder`, which `decoder: model` asks for: give it that attribute, a dict with name, "
            "size, anchors and weights (docs/tasks/detection.md), or leave `decoder` out for a grid head"
        )
    if isinstance(found, DecoderSpec):
        return found
    if not isinstance(found, Mapping) or found.get("name") not in DECODERS or not found.keys() <= set(_FIELDS):
        raise ModelError(
            f"{what} has a `box_decoder` that is no dict of {', '.join(_FIELDS)} with one of the names "
            f"{', '.join(DECODERS)}: {_shown(found)}"
        )
    try:
        numbers = torch.as_tensor(found.get("anchors", ()), dtype=torch.float32).reshape(-1, BOX)
        spec = DecoderSpec(
            found["name"],
            (int(found["size"][0]), int(found["size"][1])),
            tuple(int(stride) for stride in found.get("strides", ())),
            tuple((x, y, width, height) for x, y, width, height in numbers.tolist()),
            tuple(float(weight) for weight in found.get("weights", ())),
        )
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{what} has a `box_decoder` that cannot be read ({error}): {_shown(found)}") from error
    if not bool((numbers[:, 2:] > 0).all()) or not bool(numbers.isfinite().all()):
        raise ModelError(
            f"{what} has anchors without area in its `box_decoder`: each is middle x, middle y, width, height"
        )
    return spec


def _shown(found: Any) -> str:
    return f"{found!r:.200}"
