"""Which filters matter: one class per criterion, looked up in `CRITERIA` and nowhere else.

A criterion scores the filters of one layer; what is done with scores of coupled layers, thresholds and targets is
the same for all. To add one, write a class (`criterion.py` has the contract; a file of its own is welcome) and put it
into the tuple at the end; recipes, their schema and the shared tests take it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...analysis.channels.axes import filters, is_depthwise, is_mixing, sliced_tensors
from ...analysis.channels.groups import ChannelGroup
from ...stage import Context
from .criterion import Criterion, Scaled, ScoredLayer
from .scores import FilterStatistics
from .similarity import Similarity


class ClassCount:
    """How many classes need the filter (METHODS §1.3, arXiv 2312.05875); 0 ... number of classes."""

    name: ClassVar[str] = "class_count"
    needs_classes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True
    needs_feature_maps: ClassVar[bool] = False
    needs_scaling: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).class_count

    def full_scale(self, classes: int) -> float:
        """All classes."""
        return float(classes)


class L1(Scaled):
    """Sum of the filter's absolute weights (arXiv 1608.08710)."""

    name: ClassVar[str] = "l1"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return layer.filters.abs().sum(dim=1)


class L2(Scaled):
    """Norm of all weights that go together, those that read the filter included (arXiv 2301.12900)."""

    name: ClassVar[str] = "l2"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return layer.energy.sqrt()


class GeometricMedian(Scaled):
    """Sum of the distances to the other filters of the layer: what others can replace goes (arXiv 1811.00250)."""

    name: ClassVar[str] = "fpgm"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        weights = layer.filters.to(torch.float64)
        return torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)


class NormalisationScale(Scaled):
    """Factor of the normalisation behind the filter (network slimming, arXiv 1708.06519)."""

    name: ClassVar[str] = "bn_scale"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return layer.scale


class Taylor(Scaled):
    """First-order loss change of removing the filter's output, ``|sum a g|``, mean over images (arXiv 1611.06440)."""

    name: ClassVar[str] = "taylor"
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).taylor.mean(dim=0)


class Fisher(Scaled):
    """Second-order loss change, ``(sum a g) ** 2``, mean over classes (arXiv 1801.05787; METHODS §1.8)."""

    name: ClassVar[str] = "fisher"
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).fisher.mean(dim=0)


class ClassCountFisher(Scaled):
    """Class count times Fisher: among the best in mean and in worst-class accuracy (METHODS §1.8)."""

    name: ClassVar[str] = "class_count_fisher"
    needs_classes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        statistics = _statistics(layer)
        return statistics.class_count * statistics.fisher.mean(dim=0)


class ClassCoverage(Scaled):
    """What a filter does for each class, as a share of what the filters that are still there do for it.

    Shares are of Taylor's loss change, so that a class with small gradients weighs as much as others. The filters to
    keep shall maximise the sum over classes of the logarithm of what is left; they leave one after the other, the one
    that costs least first. A class that has lost much already is spared, which no sum over classes does, and the last
    filter of a class costs without limit. The score is the cost at the moment of leaving; it never falls.
    """

    name: ClassVar[str] = "class_coverage"
    needs_classes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True
    most_steps: ClassVar[int] = 512

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        effect = _statistics(layer).taylor.to(torch.float64)
        shares = effect / effect.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        scores = torch.zeros(shares.shape[1], dtype=torch.float64)
        waiting = torch.arange(shares.shape[1])
        # very wide layers leave several at a time, else the time would grow with the square of the width
        at_once = -(-len(waiting) // self.most_steps)
        while len(waiting):
            there = shares[:, waiting]
            lost = there / there.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            cost = -torch.log1p(-lost.clamp_max(1.0 - 1e-9)).mean(dim=0)
            order = torch.argsort(cost, stable=True)
            scores[waiting[order[:at_once]]] = cost[order[:at_once]]
            waiting = waiting[order[at_once:].sort().values]
        return scores


class ClassCoverageDistance(Scaled):
    """Sum of two ranks within the layer, by `ClassCoverage` and by `GeometricMedian`.

    The one knows which classes would miss a filter, the other whether other filters can take its place after
    retraining; ranks, because their scores are spread very differently.
    """

    name: ClassVar[str] = "class_coverage_fpgm"
    needs_classes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        coverage, distance = ClassCoverage().filter_scores(layer), GeometricMedian().filter_scores(layer)
        return _ranks(coverage) + _ranks(distance.cpu())


class Random(Scaled):
    """No knowledge at all: the control."""

    name: ClassVar[str] = "random"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return torch.rand(len(layer.filters), generator=layer.generator)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        ClassCount(),
        ClassCountFisher(),
        ClassCoverage(),
        ClassCoverageDistance(),
        Fisher(),
        Taylor(),
        L1(),
        L2(),
        GeometricMedian(),
        Similarity(),
        NormalisationScale(),
        Random(),
    )
}
"""Every criterion by name."""


@dataclass(frozen=True)
class UnitScores:
    """Of one group with U units.

    Attributes:
        score: float64 [U], on the criterion's scale.
        size: float64 [U], L1 norm of the unit's filters; breaks ties.
        loss: float64 [U], Fisher loss change; zeros without statistics.
    """

    score: Tensor
    size: Tensor
    loss: Tensor


def filter_scores(
    criterion: Criterion,
    model: nn.Module,
    statistics: Mapping[str, FilterStatistics],
    groups: Sequence[ChannelGroup],
    context: Context,
    iteration: int,
    correlation: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Scaled scores float64 [F] of every layer that has filters in `groups`."""
    modules = dict(model.named_modules())
    found = {}
    for path, (energy, scale) in coupled_weights(groups, modules).items():
        generator = context.generator("criterion", criterion.name, iteration, path)
        alike = (correlation or {}).get(path)
        layer = ScoredLayer(path, modules[path], statistics.get(path), generator, energy, scale, alike)
        score = criterion.filter_scores(layer).detach().cpu().to(torch.float64)
        if criterion.needs_scaling:
            score = score / score.mean().clamp_min(torch.finfo(torch.float64).tiny)
        found[path] = score
    return found


def coupled_weights(
    groups: Sequence[ChannelGroup], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per producer `ScoredLayer.energy` and `ScoredLayer.scale`."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        energy = torch.zeros(group.units, dtype=torch.float64)
        scales = []
        for (owner, side), channels in group.members.items():
            module = modules.get(owner)
            if module is None:
                continue
            for name, dim, at in sliced_tensors(module, derived=True):
                if name != "weight" or at != side:
                    continue
                weight = getattr(module, name).detach().cpu().to(torch.float64).movedim(dim, 0)
                weight = weight.reshape(len(weight), -1)
                if is_mixing(module) or is_depthwise(module):
                    energy += weight.square().sum(dim=1)[channels].sum(dim=1)
                else:
                    scales.append(weight.abs().mean(dim=1)[channels].mean(dim=1))
        for path in group.producers:
            rows = filters(modules[path]).cpu().to(torch.float64).square().sum(dim=1)
            of_layer = found.setdefault(path, (rows, rows.sqrt()))
            channels = group.members[(path, "out")]
            of_layer[0][channels] = energy[:, None].expand(channels.shape)
            if scales:
                of_layer[1][channels] = torch.stack(scales).mean(dim=0)[:, None].expand(channels.shape)
    return found


def unit_scores(
    group: ChannelGroup, scores: Mapping[str, Tensor], statistics: Mapping[str, FilterStatistics], model: nn.Module
) -> UnitScores:
    """Scores of a group's units: the largest of a unit's filters, because one that is needed keeps the others."""
    modules = dict(model.named_modules())
    score, size, loss = [], [], []
    for path in group.producers:
        channels = group.members[(path, "out")]
        score.append(scores[path][channels].amax(dim=1))
        size.append(filters(modules[path]).cpu().to(torch.float64).abs().sum(dim=1)[channels].sum(dim=1))
        if path in statistics:
            loss.append(statistics[path].fisher.mean(dim=0).to(torch.float64)[channels].sum(dim=1))
    largest = torch.stack(score).amax(dim=0)
    return UnitScores(
        largest, torch.stack(size).sum(dim=0), torch.stack(loss).sum(dim=0) if loss else torch.zeros_like(largest)
    )


def _ranks(scores: Tensor) -> Tensor:
    """Place of every score, float64 [F], the smallest has 0; equal scores by index."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[torch.argsort(scores, stable=True)] = torch.arange(len(scores), dtype=torch.float64)
    return ranks


def _statistics(layer: ScoredLayer) -> FilterStatistics:
    assert layer.statistics is not None, "the caller collects statistics for criteria that need them"
    return layer.statistics
