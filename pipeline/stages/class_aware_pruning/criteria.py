"""Which filters matter: one class per criterion, looked up in `CRITERIA` and nowhere else.

A criterion scores the filters of one layer; what is done with scores of coupled layers, thresholds and targets is
the same for all. To add one, write a class and put it into the tuple at the end; the shared tests take it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...stage import Context
from .axes import filters
from .groups import ChannelGroup
from .scores import FilterStatistics


@dataclass(frozen=True)
class ScoredLayer:
    """What a criterion may look at.

    Attributes:
        path: of the layer.
        module: a convolution or linear layer.
        statistics: None unless the criterion asks for them.
        generator: for random choices, its own for every layer and iteration.
    """

    path: str
    module: nn.Module
    statistics: FilterStatistics | None
    generator: torch.Generator

    @property
    def filters(self) -> Tensor:
        """Weights float [F, everything else]."""
        return filters(self.module)


class Criterion(Protocol):
    """The contract.

    Attributes:
        name: as recipes write it.
        needs_statistics: whether `ScoredLayer.statistics` must be there.
        needs_scaling: False if scores compare across layers as they are; True if they first have to be divided by
            their mean over the layer, so that 1 is the layer's average filter.
    """

    name: ClassVar[str]
    needs_statistics: ClassVar[bool]
    needs_scaling: ClassVar[bool]

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """Float [F] >= 0, larger for filters that matter more."""
        ...

    def full_scale(self, classes: int) -> float:
        """The score that `threshold_frac` is a share of, after scaling."""
        ...


class _Scaled:
    """A criterion whose scores are relative to the layer's average filter."""

    needs_scaling: ClassVar[bool] = True

    def full_scale(self, classes: int) -> float:
        """The average filter of a layer."""
        del classes
        return 1.0


class ClassCount:
    """How many classes need the filter (METHODS §1.3, arXiv 2312.05875); 0 ... number of classes."""

    name: ClassVar[str] = "class_count"
    needs_statistics: ClassVar[bool] = True
    needs_scaling: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).class_count

    def full_scale(self, classes: int) -> float:
        """All classes."""
        return float(classes)


class L1(_Scaled):
    """Sum of the filter's absolute weights (arXiv 1608.08710)."""

    name: ClassVar[str] = "l1"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return layer.filters.abs().sum(dim=1)


class Taylor(_Scaled):
    """First-order loss change of removing the filter's output, ``|sum a g|``, mean over images (arXiv 1611.06440)."""

    name: ClassVar[str] = "taylor"
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).taylor.mean(dim=0)


class Fisher(_Scaled):
    """Second-order loss change, ``(sum a g) ** 2``, mean over classes (arXiv 1801.05787; METHODS §1.8)."""

    name: ClassVar[str] = "fisher"
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return _statistics(layer).fisher.mean(dim=0)


class ClassCountFisher(_Scaled):
    """Class count times Fisher: among the best in mean and in worst-class accuracy (METHODS §1.8)."""

    name: ClassVar[str] = "class_count_fisher"
    needs_statistics: ClassVar[bool] = True

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        statistics = _statistics(layer)
        return statistics.class_count * statistics.fisher.mean(dim=0)


class Random(_Scaled):
    """No knowledge at all: the control."""

    name: ClassVar[str] = "random"
    needs_statistics: ClassVar[bool] = False

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """See `Criterion.filter_scores`."""
        return torch.rand(len(layer.filters), generator=layer.generator)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion for criterion in (ClassCount(), ClassCountFisher(), Fisher(), Taylor(), L1(), Random())
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
    layers: list[str],
    context: Context,
    iteration: int,
) -> dict[str, Tensor]:
    """Scaled scores float64 [F] of every layer in `layers`."""
    modules = dict(model.named_modules())
    found = {}
    for path in layers:
        generator = context.generator("criterion", criterion.name, iteration, path)
        layer = ScoredLayer(path, modules[path], statistics.get(path), generator)
        score = criterion.filter_scores(layer).detach().cpu().to(torch.float64)
        if criterion.needs_scaling:
            score = score / score.mean().clamp_min(torch.finfo(torch.float64).tiny)
        found[path] = score
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


def _statistics(layer: ScoredLayer) -> FilterStatistics:
    assert layer.statistics is not None, "the caller collects statistics for criteria that need them"
    return layer.statistics
