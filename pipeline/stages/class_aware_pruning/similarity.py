"""Redundant channels by the similarity of their feature maps (QSFM, arXiv 2105.06052; METHODS §6 and §9.0).

And what may be done about any channel that goes: the surviving channel that is most like it gets its weights in the
layers that read it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...analysis.channels.axes import is_convolution, is_mixing, sliced_tensors
from ...analysis.channels.flow import Axis
from ...analysis.channels.groups import Channels
from .criterion import Scaled, ScoredLayer
from .feature_maps import Moments


class Similarity(Scaled):
    """What the channel's closest neighbour does not say already: 1 minus the correlation of their feature maps.

    Of the two channels that are closest, the one whose weights are smaller leaves, and so on with those that are left;
    its score is that of the moment of leaving, and never falls.
    """

    name: ClassVar[str] = "similarity"
    needs_statistics: ClassVar[bool] = False
    needs_feature_maps: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        assert layer.correlation is not None, "the caller compares feature maps for criteria that need them"
        alike = layer.correlation.clone()
        scores = torch.ones(len(alike), dtype=torch.float64)
        constant = alike.diagonal() > 0
        scores[constant] = 0.0
        alike.fill_diagonal_(0.0)
        alike[constant] = alike[:, constant] = 0.0
        closest, partner = alike.max(dim=1)
        for _ in range(int((~constant).sum()) - 1):
            one = int(closest.argmax())
            other = int(partner[one])
            if closest[one] <= 0:
                break
            # of equals the later one
            key = (float(layer.energy[one]), -one), (float(layer.energy[other]), -other)
            goes = one if key[0] < key[1] else other
            scores[goes] = 1.0 - closest[one]
            alike[goes] = alike[:, goes] = 0.0
            orphans = (partner == goes).nonzero().flatten()
            closest[orphans], partner[orphans] = alike[orphans].max(dim=1)
            closest[goes] = 0.0
        return scores


def handed_over(
    model: nn.Module,
    channels: Channels,
    kept: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[Axis, Moments]],
) -> nn.Module:
    """A copy of full width in which the survivors know what is about to go.

    In every dense layer that reads a group, the weights of a unit that goes, times the regression coefficient of its
    maps on those of the unit that stays and is most like it, are added to that unit's; what the regression has left as
    a constant goes into the layer's bias, where it has one. Exact where a map is a multiple of the other, with a
    constant where no border is padded.

    Args:
        model: before the cut.
        channels: of `model`.
        kept: per group the units that are to stay.
        moments: of those groups at least, of `model`.
    """
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    done: set[tuple[str, int]] = set()
    for group in channels.groups:
        if group.name not in kept or len(kept[group.name]) in (0, group.units):
            continue
        stays = torch.zeros(group.units, dtype=torch.bool)
        stays[kept[group.name]] = True
        for axis, found in moments[group.name].items():
            module: Any = modules[axis[0]]
            weight = getattr(module, "weight", None)
            # a weight that several layers share is changed once; of grouped convolutions whole groups go
            dense = axis[1] == "in" and is_mixing(module) and getattr(module, "groups", 1) == 1
            if not dense or (group.name, id(weight)) in done:
                continue
            done.add((group.name, id(weight)))
            _hand_over(module, group.members[axis], stays, found)
    return changed


@torch.no_grad()
def _hand_over(module: Any, channels: Tensor, stays: Tensor, moments: Moments) -> None:
    dim = next(d for name, d, side in sliced_tensors(module) if name == "weight" and side == "in")
    weight = module.weight.movedim(dim, 0)
    bias = module.bias if not _transposed(module) else None
    gone = (~stays).nonzero().flatten()
    alike = moments.correlation[gone].masked_fill(~stays, -1.0)
    survivor = alike.argmax(dim=1)
    variance = moments.covariance.diagonal()[survivor]
    square = variance + moments.mean[survivor].square()
    together = moments.covariance[gone, survivor] + moments.mean[gone] * moments.mean[survivor]
    slope = (together / square).where(square > 0, 0.0)
    if bias is not None:
        # with a bias the constant part is said apart, which a constant survivor could not
        slope = (moments.covariance[gone, survivor] / variance).where(~moments.constant[survivor], 0.0)
        constant = (moments.mean[gone] - slope * moments.mean[survivor]).to(weight)
        lost = weight[channels[gone]].sum(dim=1)  # [gone, out, kernel]
        bias += torch.tensordot(constant, lost.flatten(2).sum(dim=2) if lost.dim() > 2 else lost, dims=1)
    passed = weight[channels[gone]] * slope.to(weight).view(-1, *[1] * weight.dim())
    weight.index_add_(0, channels[survivor].flatten(), passed.flatten(0, 1))


def _transposed(module: nn.Module) -> bool:
    """Whether the sum over the kernel is not what a constant input adds to every output."""
    return is_convolution(module) and bool(getattr(module, "transposed", False))
