"""What a raw head of anchors [N, A, 5 + C] learns (SSD): which anchors answer for which box, and how wrong they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.decoders import BOX
from edgewright.edge_runtime.bundle.manifest import DecoderSpec

_MATCHES = 0.5
"""Overlap from which an anchor answers for a box; the best anchor of a box does so whatever its overlap."""
_NEGATIVES = 3
"""The anchors of background that learn, the wrongest ones, for each that answers for a box."""


class AnchorLoss:
    """Cross entropy of the classes with background, and smooth L1 of the offsets, as `torchvision`'s SSD has them.

    Args:
        decoder: an ``ssd``.
    """

    def __init__(self, decoder: DecoderSpec) -> None:
        self._anchors = torch.tensor(decoder.anchors, dtype=torch.float32)
        self._weights = torch.tensor(decoder.weights, dtype=torch.float32)

    def assigned(self, targets: Tensor) -> Tensor:
        """Which box every anchor answers for, int64 [N, A]; -1 for background.

        Args:
            targets: float32 [N, M, 5]: class, left, top, right, bottom; class -1 where there is none.
        """
        anchors = self._anchors.to(targets.device)
        real = targets[..., 0] >= 0
        shared = _overlap(targets[..., 1:], torch.cat([anchors[:, :2] - anchors[:, 2:] / 2, _far(anchors)], dim=1))
        best, which = shared.masked_fill(~real[..., None], -1.0).max(dim=1)
        which = torch.where(best >= _MATCHES, which, -1)
        # of boxes that have the same best anchor the last one gets it
        number = torch.arange(targets.shape[1], device=targets.device).expand_as(real)
        forced = torch.full_like(which, -1).scatter_reduce(
            1, shared.argmax(dim=2), torch.where(real, number, -1), "amax"
        )
        return torch.where(forced >= 0, forced, which)

    def parts(self, raw: Tensor, targets: Tensor) -> Tensor:
        """The loss of every sample and class, [N, C]; the mean over samples of its sums is the loss.

        What an anchor of background costs is dealt out to the classes that it is taken for, in the shares of their
        probabilities; these shares are constants to the gradient.

        Args:
            raw: float32 [N, A, 5 + C], background before the classes.
            targets: as in `assigned`.
        """
        classes = raw.shape[2] - BOX - 1
        if targets.shape[1] == 0:
            targets = targets.new_full((len(targets), 1, 5), -1.0)
        which = self.assigned(targets)
        found = which >= 0
        own = targets.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 5))
        label = torch.where(found, own[..., 0].long() + 1, 0)
        # one row for each anchor: the form with places has no deterministic kernel on CUDA
        flat = nn.functional.cross_entropy(raw[..., BOX:].flatten(0, 1), label.flatten(), reduction="none")
        each = flat.reshape(label.shape)
        hard = _hardest(each.detach(), found)
        offsets = torch.where(found[..., None], self.codes(own[..., 1:]), 0.0)
        away = nn.functional.smooth_l1_loss(raw[..., :BOX], offsets, reduction="none").sum(dim=2)
        positive = nn.functional.one_hot((label - 1).clamp(min=0), classes).to(raw.dtype) * found[..., None]
        taken_for = raw[..., BOX + 1 :].detach().softmax(dim=2)
        parts = (each + away)[..., None] * positive + (each * hard)[..., None] * taken_for
        return parts.sum(dim=1) * (len(raw) / found.sum().clamp(min=1))

    def codes(self, boxes: Tensor) -> Tensor:
        """Boxes [..., A, 4] as the offsets [..., A, 4] that the decoder on the device takes; of empty ones any."""
        anchors, weights = self._anchors.to(boxes.device), self._weights.to(boxes.device)
        middle, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        moved = (middle - anchors[:, :2]) / anchors[:, 2:]
        return torch.cat([moved, (side / anchors[:, 2:]).log()], dim=-1) * weights


def _far(anchors: Tensor) -> Tensor:
    return anchors[:, :2] + anchors[:, 2:] / 2


def _hardest(loss: Tensor, found: Tensor) -> Tensor:
    """Bool [N, A]: the anchors of background that cost most, so many for each that answers for a box of the sample."""
    wanted = _NEGATIVES * found.sum(dim=1, keepdim=True)
    order = loss.masked_fill(found, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    return (place < wanted) & ~found


def _overlap(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Intersection over union [N, M, A] of boxes [N, M, 4] and corners [A, 4]."""
    one = boxes[:, :, None]
    inside = (torch.minimum(one[..., 2:], anchors[:, 2:]) - torch.maximum(one[..., :2], anchors[:, :2])).clamp(min=0)
    shared = inside.prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (one, anchors)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)
