"""Ranks in units of loss: a byte goes where it saves most (METHODS §3.5, item 7)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_BLOCK = 8


@dataclass(frozen=True)
class RankDemand:
    """One group that wants ranks.

    Attributes:
        spectrum: what each rank saves, descending, in the same unit for all groups.
        cost: weights that one rank takes: d_in + Σ d_out.
        uniform: the rank it would have if all groups kept the same share.
        most: its largest rank that saves weights.
        align: ranks are multiples of this.
    """

    spectrum: Tensor
    cost: int
    uniform: int
    most: int
    align: int = 1


def allocate_ranks(demands: Sequence[RankDemand], budget: int, floor: float = 0.3, power: float = 1.0) -> list[int]:
    """Ranks of all groups, whose weights together are at most `budget`.

    Every group begins with `floor` of its uniform rank. Then the block of ranks with the largest saving per weight is
    taken, again and again, until no block fits.

    Args:
        demands: the groups.
        budget: weights in all; at least what the uniform ranks take, else the floors alone may exceed it.
        floor: share of the uniform rank that no group falls below.
        power: exponent of the spectrum; below 1 the cost of a rank counts for more.
    """
    ranks: list[int] = []
    heap: list[tuple[float, int]] = []
    gains = [demand.spectrum.double().clamp(min=0.0).pow(power).cumsum(0) for demand in demands]

    def block(i: int) -> int:
        step = max(_BLOCK, demands[i].align) // demands[i].align * demands[i].align
        return min(step, demands[i].most - ranks[i])

    def push(i: int) -> None:
        size = block(i)
        if size > 0:
            last = len(gains[i]) - 1
            before = float(gains[i][min(ranks[i], len(gains[i])) - 1]) if ranks[i] else 0.0
            gain = float(gains[i][min(ranks[i] + size - 1, last)]) - before
            heapq.heappush(heap, (-gain / (size * demands[i].cost), i))

    for i, demand in enumerate(demands):
        least = int(floor * demand.uniform) // demand.align * demand.align
        ranks.append(min(demand.most, max(demand.align, least, 1)))
        push(i)
    left = budget - sum(rank * demand.cost for rank, demand in zip(ranks, demands, strict=True))
    while heap:
        _, i = heapq.heappop(heap)
        size = block(i)
        if size * demands[i].cost > left:
            continue
        ranks[i] += size
        left -= size * demands[i].cost
        push(i)
    return ranks
