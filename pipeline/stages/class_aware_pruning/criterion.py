"""The contract of a criterion: what it may look at, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...analysis.channels.axes import filters
from .scores import FilterStatistics


@dataclass(frozen=True)
class ScoredLayer:
    """What a criterion may look at.

    Attributes:
        path: of the layer.
        module: a convolution or linear layer.
        statistics: None unless the criterion asks for them.
        generator: for random choices, its own for every layer and iteration.
        energy: float64 [F], sum of squares of all weights that go when the filter goes: its own, those of coupled
            filters, and those of later layers that read it.
        scale: float64 [F], size of the factor by which the normalisation behind multiplies the filter; where there is
            none, the norm of its weights, which then is that factor.
        correlation: float64 [F, F], how alike the feature maps of two filters are to those who read them, 0 ... 1;
            on the diagonal 1 for maps that are the same number everywhere, else 0. None unless the criterion asks.
    """

    path: str
    module: nn.Module
    statistics: FilterStatistics | None
    generator: torch.Generator
    energy: Tensor
    scale: Tensor
    correlation: Tensor | None = None

    @property
    def filters(self) -> Tensor:
        """Weights float [F, everything else]."""
        return filters(self.module)


class Criterion(Protocol):
    """The contract.

    Attributes:
        name: as recipes write it.
        needs_classes: whether it compares what a filter does for one class and for another.
        needs_statistics: whether `ScoredLayer.statistics` must be there.
        needs_feature_maps: whether `ScoredLayer.correlation` must be there; it needs no classes.
        needs_scaling: False if scores compare across layers as they are; True if they first have to be divided by
            their mean over the layer, so that 1 is the layer's average filter.
    """

    name: ClassVar[str]
    needs_classes: ClassVar[bool]
    needs_statistics: ClassVar[bool]
    needs_feature_maps: ClassVar[bool]
    needs_scaling: ClassVar[bool]

    def filter_scores(self, layer: ScoredLayer) -> Tensor:
        """Float [F] >= 0, larger for filters that matter more."""
        ...

    def full_scale(self, classes: int) -> float:
        """The score that `threshold_frac` is a share of, after scaling."""
        ...


class Scaled:
    """A criterion whose scores are relative to the layer's average filter; any task will do."""

    needs_classes: ClassVar[bool] = False
    needs_feature_maps: ClassVar[bool] = False
    needs_scaling: ClassVar[bool] = True

    def full_scale(self, classes: int) -> float:
        """The average filter of a layer."""
        del classes
        return 1.0
