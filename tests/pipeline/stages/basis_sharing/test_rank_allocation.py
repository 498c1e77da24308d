from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgewright.pipeline.stages.basis_sharing.rank_allocation import RankDemand, allocate_ranks


def demand(values: list[float], cost: int = 10, uniform: int = 8, most: int = 16, align: int = 1) -> RankDemand:
    return RankDemand(torch.tensor(sorted(values, reverse=True)), cost, uniform, most, align)


spectra = st.lists(st.floats(0.0, 100.0), min_size=16, max_size=16)


@given(
    st.lists(st.tuples(spectra, st.integers(1, 30), st.sampled_from([1, 8])), min_size=1, max_size=5),
    st.floats(0.0, 1.0),
)
def test_floor_cap_alignment_and_budget_hold(groups: list[tuple[list[float], int, int]], floor: float) -> None:
    demands = [demand(values, cost, align=align) for values, cost, align in groups]
    budget = sum(d.cost * d.uniform for d in demands)
    ranks = allocate_ranks(demands, budget, floor)
    assert all(max(1, int(floor * 8) // d.align * d.align) <= r <= d.most for r, d in zip(ranks, demands, strict=True))
    assert all(r % d.align == 0 for r, d in zip(ranks, demands, strict=True))
    assert sum(r * d.cost for r, d in zip(ranks, demands, strict=True)) <= budget


def test_it_saves_as_much_as_any_other_way_of_equal_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        demands = [demand((torch.rand(64, generator=generator) ** 3).tolist(), 5, 24, 64) for _ in range(3)]
        ranks = allocate_ranks(demands, 5 * 72, floor=0.34)

        def saved(chosen: tuple[int, ...], demands: list[RankDemand] = demands) -> float:
            return sum(float(d.spectrum[:r].sum()) for r, d in zip(chosen, demands, strict=True))

        ways = [w for w in itertools.product(range(8, 65, 8), repeat=3) if sum(w) <= 72]
        assert saved(tuple(ranks)) >= max(map(saved, ways)) - 1e-4


def test_damping_makes_the_cost_count_for_more() -> None:
    # the powers of two spectra keep their order; against the cost they do not
    demands = [demand([20.0] * 64, 4, 24, 64), demand([1.0] * 64, 1, 24, 64)]
    plain, damped = (allocate_ranks(demands, 4 * 24 + 24, 0.3, power) for power in (1.0, 0.25))
    assert plain[0] > damped[0] and damped[1] > plain[1]
