"""What a raw grid head [N, A, 4 + C] learns: which cells answer for which box, and how wrong they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.decoders import BOX, centres
from edgewright.edge_runtime.bundle.manifest import DecoderSpec

_SIDE = 4.0
"""A box is learned where its longer side is about so many strides."""
_REACH = 1.5
"""By the cells whose middle is at most so many strides from the box's, and inside it."""
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss, as published


class GridLoss:
    """Focal loss of the classes and generalised overlap of the boxes, over the cells that answer (FCOS, RetinaNet).

    Args:
        decoder: a ``grid``.
    """

    def __init__(self, decoder: DecoderSpec) -> None:
        middle, stride = centres(decoder)
        self._middle, self._stride = torch.from_numpy(middle), torch.from_numpy(stride)
        self._levels = torch.tensor(sorted(set(decoder.strides)), dtype=torch.float32)

    def assigned(self, targets: Tensor) -> Tensor:
        """Which box every cell answers for, int64 [N, A]; -1 for none. Of several boxes the smallest.

        Args:
            targets: float32 [N, M, 5]: class, left, top, right, bottom; class -1 where there is none.
        """
        middle, stride = self._middle.to(targets.device), self._stride.to(targets.device)
        levels = self._levels.to(targets.device)
        corner, far = targets[..., 1:3], targets[..., 3:]
        side = (far - corner).amax(dim=-1).clamp(min=1e-3)
        own = levels[(side[..., None] / (_SIDE * levels)).log().abs().argmin(dim=-1)]
        from_middle = (middle[None, None] - (corner + far)[:, :, None] / 2).abs().amax(dim=-1)
        reach = torch.where(stride == own[..., None], _REACH * stride, -1.0)
        inside = ((middle > corner[:, :, None]) & (middle < far[:, :, None])).all(dim=-1)
        # a box without a middle inside it is answered by the nearest one
        away = torch.where(stride == own[..., None], from_middle, torch.inf)
        nearest = away == away.amin(dim=-1, keepdim=True)
        fits = (((from_middle < reach) & inside) | nearest) & (targets[..., :1] >= 0)
        area = ((far - corner).prod(dim=-1, keepdim=True)).expand(fits.shape).masked_fill(~fits, torch.inf)
        smallest, which = area.min(dim=1)
        return torch.where(smallest.isfinite(), which, -1)

    def parts(self, raw: Tensor, targets: Tensor) -> Tensor:
        """The loss of every sample and class, [N, C]; the mean over samples of its sums is the loss.

        Args:
            raw: float32 [N, A, 4 + C].
            targets: as in `assigned`.
        """
        classes = raw.shape[2] - BOX
        if targets.shape[1] == 0:
            targets = targets.new_full((len(targets), 1, 5), -1.0)
        which = self.assigned(targets)
        found = which >= 0
        own = targets.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 5))
        label = own[..., 0].long().clamp(min=0)
        wanted = nn.functional.one_hot(label, classes).to(raw.dtype) * found[..., None]
        count = found.sum(dim=1).clamp(min=1).to(raw.dtype)
        each = _focal(raw[..., BOX:], wanted).sum(dim=1)
        boxes = ((1.0 - _generalised_overlap(self.boxes(raw), own[..., 1:]))[..., None] * wanted).sum(dim=1)
        return (each + boxes) / count[:, None]

    def boxes(self, raw: Tensor) -> Tensor:
        """Float32 [N, A, 4], as the decoder on the device makes them."""
        middle, stride = self._middle.to(raw.device), self._stride.to(raw.device)
        distance = nn.functional.softplus(raw[..., :BOX]) * stride[:, None]
        return torch.cat([middle - distance[..., :2], middle + distance[..., 2:]], dim=-1)


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    plain = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = torch.where(wanted > 0, logits.sigmoid(), 1 - logits.sigmoid())
    return torch.where(wanted > 0, _ALPHA, 1 - _ALPHA) * (1 - right) ** _GAMMA * plain


def _generalised_overlap(one: Tensor, other: Tensor) -> Tensor:
    """GIoU of boxes [..., 4], pair by pair."""
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    inside = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(dim=-1) for x in (one, other)]
    union = (areas[0] + areas[1] - inside).clamp(min=1e-6)
    around = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    hull = around.clamp(min=0).prod(dim=-1).clamp(min=1e-6)
    return inside / union - (hull - union) / hull
