"""Detection networks of torchvision as models with one tensor: the raw head, before anchors, scores and choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .python_source import refuse_unknown_arguments

ANCHORED = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
"""What is built here, all of it SSD, and the side of the images that each is made for."""
WHAT = "the raw head of a detector"
_TWO_STAGES = ("fasterrcnn_", "maskrcnn_", "keypointrcnn_")


class AnchoredHead(nn.Module):
    """Offsets and class logits of all anchors [N, A, 4 + 1 + C], background before the classes, of an SSD.

    ``[N, 3, H, W]`` images that are normalised already, of the size that the anchors are for.

    Attributes:
        model: torchvision's, under whose names published weights lie.
        size: (height, width) of the images.
    """

    model: Any

    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        """Wraps `model`, a `torchvision.models.detection.ssd.SSD`."""
        super().__init__()
        self.model, self.size = model, size

    def forward(self, image: Tensor) -> Tensor:
        """The raw head."""
        heads = self.model.head(list(self.model.backbone(image).values()))
        return torch.cat([heads["bbox_regression"], heads["cls_logits"]], dim=2)

    @property
    def box_decoder(self) -> Mapping[str, Any]:
        """How the raw head becomes boxes; anchors as middle x, middle y, width and height in pixels."""
        from torchvision.models.detection.image_list import ImageList

        blank = torch.empty(1, 3, *self.size, device="meta")
        maps = copy.deepcopy(self.model.backbone).to("meta").eval()(blank).values()
        # of images and maps it reads the sizes only
        (corners,) = self.model.anchor_generator(
            ImageList(blank, [(self.size[0], self.size[1])]), [torch.empty(x.shape) for x in maps]
        )
        low, high = corners[:, :2], corners[:, 2:]
        return {
            "name": "ssd",
            "size": self.size,
            "anchors": torch.cat([(low + high) / 2, high - low], dim=1),
            "weights": self.model.box_coder.weights,
        }


def refusal(name: str) -> str | None:
    """Why a detection network of torchvision is not built here; None if it is, or no detection network at all."""
    if name.startswith(_TWO_STAGES):
        return (
            f"torchvision:{name} has two stages: how many boxes its second stage looks at depends on values of "
            "the image, so that no graph of fixed shapes can be trained, compressed and proven; take a network of one "
            f"stage ({', '.join(ANCHORED)}), or one of your own that returns a raw head (docs/tasks/detection.md)"
        )
    if name.startswith("retinanet_"):
        return (
            f"torchvision:{name} scores each class of an anchor by itself, and the decoder of anchors here (ssd) has a "
            f"softmax with background: take {' or '.join(ANCHORED)}, or a network of your own with a decoder that "
            "ships (docs/tasks/detection.md)"
        )
    if name.startswith("fcos_"):
        return (
            f"torchvision:{name} multiplies its scores by a centre-ness and measures boxes otherwise than the decoder "
            f"`grid` does: take {' or '.join(ANCHORED)}, or a network of your own with a grid head "
            "(docs/tasks/detection.md)"
        )
    return None


def build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network with fresh weights.

    Args:
        name: one of `ANCHORED`.
        args: ``classes``, a number without background, and ``size``, a side or (height, width), default what the name
            says.

    Raises:
        ValueError: arguments that do not fit.
    """
    from torchvision.models import get_model_builder

    full, usual = f"torchvision:{name}", ANCHORED[name]
    refuse_unknown_arguments(args, ["classes", "size"], full)
    classes, size = args.get("classes"), args.get("size", usual)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"{full} needs `classes`, how many there are without background, and got {classes!r}")
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"{full}: size is {size!r}: give a side in pixels, or [height, width]")
    model = AnchoredHead(get_model_builder(name)(weights=None, weights_backbone=None, num_classes=classes + 1), sides)
    if sides != (usual, usual):
        # steps in pixels are for the usual size; without them its cells divide the image evenly
        model.model.anchor_generator.steps = None
        try:
            _ = model.box_decoder
        except RuntimeError as error:
            raise ValueError(f"{full}: its layers do not fit on images of {sides[0]} x {sides[1]}: {error}") from error
    return model
