from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgewright.pipeline.stages.basis_sharing.factorization import (
    Metric,
    Target,
    balanced,
    diagonal_metric,
    factorize,
    identity_metric,
    joint_metric,
    kept_share,
    metric_of,
    rank_for,
    refit_coefficients,
    saves_weights,
    shared_basis,
    squared_norm,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def metric(width: int, rows: int, seed: int = 100) -> Metric:
    """The norm of correlated inputs."""
    x = matrix(rows, width, seed) @ matrix(width, width, seed + 1)
    return metric_of(x.T @ x / rows)


# d_in, d_outs, removed percent, rank: METHODS §3.2; n = 2 for shared types, n = 1 for private ones
RANKS = [
    *[(4096, [4096] * 2, r, k) for r, k in zip((20, 30, 40, 50, 60), (2184, 1911, 1638, 1365, 1092), strict=True)],
    *[(4096, [4096], r, k) for r, k in zip((20, 30, 40, 50, 60), (1638, 1433, 1228, 1024, 819), strict=True)],
    *[(4096, [11008] * 2, r, k) for r, k in zip((20, 30, 40, 50, 60), (2762, 2417, 2072, 1726, 1381), strict=True)],
    *[(11008, [4096], r, k) for r, k in zip((20, 30, 40, 50, 60), (2388, 2089, 1791, 1492, 1194), strict=True)],
    *[(4096, [16384] * 2, r, k) for r, k in ((20, 2912), (50, 1820))],
    *[(16384, [4096], r, k) for r, k in ((20, 2621), (50, 1638))],
    *[(4096, [1024], r, k) for r, k in ((20, 655), (50, 409))],
    *[(4096, [14336] * 2, r, k) for r, k in ((20, 2867), (50, 1792))],
    *[(14336, [4096], r, k) for r, k in ((20, 2548), (50, 1592))],
    (768, [2304] * 2, 20, 526),
    (768, [768] * 2, 20, 409),
    (768, [3072] * 2, 20, 546),
    (3072, [768], 20, 491),
]


@pytest.mark.parametrize(("d_in", "d_outs", "removed", "rank"), RANKS)
def test_ranks_of_the_paper(d_in: int, d_outs: list[int], removed: int, rank: int) -> None:
    assert rank_for(kept_share(removed / 100), d_in, d_outs) == rank


def test_rank_is_exact_where_binary_fractions_are_not() -> None:
    # 1 - 0.9 is 0.09999999999999998 in binary: a floor of 10 times that would be 0
    assert rank_for(kept_share(0.9), 20, [20]) == 1
    assert rank_for(kept_share(0.4), 20, [20]) == 6
    assert rank_for(kept_share(0.3), 64, [32, 96]) == int(Fraction(7, 10) * 64 * 128 / 192)


def test_alignment_leaves_small_ranks_alone() -> None:
    assert [rank_for(kept_share(0.0), d, [d], 8) for d in (14, 16, 34)] == [7, 8, 16]


@given(
    d_in=st.integers(1, 300),
    d_outs=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    percent=st.integers(0, 99),
    align=st.sampled_from([1, 4, 8]),
)
def test_rank_keeps_the_budget(d_in: int, d_outs: list[int], percent: int, align: int) -> None:
    rank = rank_for(kept_share(percent / 100), d_in, d_outs, align)
    used = rank * (d_in + sum(d_outs))
    assert rank == 1 or rank % align == 0 or rank < align
    if rank > 1:
        assert used * 100 <= (100 - percent) * d_in * sum(d_outs)
    assert saves_weights(rank, d_in, d_outs) == (used < d_in * sum(d_outs))
    if saves_weights(rank, d_in, d_outs):
        assert rank <= min(d_in, sum(d_outs))


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 10), (24, 40), (40, 12)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_error_is_the_sum_of_discarded_eigenvalues(d_in: int, d_out: int, rank: int) -> None:
    matrices = [matrix(d_in, d_out, 1), matrix(d_in, d_out, 2)]
    norms = [metric(d_in, 200, 3), metric(d_in, 200, 5)]
    factors = factorize(matrices, norms, rank, refit="group")
    joint = joint_metric(norms).moment
    discarded = float(factors.spectrum[rank:].sum())
    error = sum(squared_norm(w - factors.basis @ c, joint) for w, c in zip(matrices, factors.coefficients, strict=True))
    assert error == pytest.approx(discarded, rel=1e-8)
    assert factors.predicted_error == pytest.approx(discarded / float(factors.spectrum.sum()), rel=1e-12)
    exact = torch.linalg.svdvals(joint_metric(norms).root @ torch.cat(matrices, dim=1)) ** 2
    assert torch.allclose(factors.spectrum, exact, rtol=1e-8)


def test_both_eigenproblems_give_one_subspace() -> None:
    w, norm = matrix(20, 20), metric(20, 100)
    narrow, _ = shared_basis(w, norm, 7)
    # a 21st column of nearly nothing sends the same problem down the other way
    wide, _ = shared_basis(torch.cat([w, 1e-9 * matrix(20, 1, 9)], dim=1), norm, 7)
    one, other = (refit_coefficients(basis, w, norm) for basis in (narrow, wide))
    assert torch.allclose(narrow @ one, wide @ other, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    d_in=st.integers(1, 24),
    d_outs=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    rows=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_full_rank_is_dense_for_any_shapes_and_calibration(d_in: int, d_outs: list[int], rows: int, seed: int) -> None:
    matrices = [matrix(d_in, d, seed + i) for i, d in enumerate(d_outs)]
    norms = [metric(d_in, rows, seed + 50 + i) for i in range(len(d_outs))]
    factors = balanced(factorize(matrices, norms, min(d_in, sum(d_outs))))
    for w, c in zip(matrices, factors.coefficients, strict=True):
        assert torch.allclose(factors.basis @ c, w, atol=1e-5), (w - factors.basis @ c).abs().max()


def test_identical_layers_share_exactly() -> None:
    w, norm = matrix(16, 12), metric(16, 100)
    factors = factorize([w, w, w], [norm] * 3, 6)
    one, two, three = factors.coefficients
    assert torch.allclose(one, two, atol=1e-12) and torch.allclose(one, three, atol=1e-12)
    alone = factorize([w], [norm], 6)
    assert factors.error == pytest.approx(3 * alone.error, rel=1e-9)
    assert factorize([w, w, w], [norm] * 3, 12).error < 1e-20 * squared_norm(w, norm.moment)


def test_refit_with_the_same_moments_gives_the_coefficients_of_the_svd() -> None:
    matrices, norm = [matrix(24, 10, i) for i in range(2)], metric(24, 300)
    _, _, v = torch.linalg.svd(norm.root @ torch.cat(matrices, dim=1))
    basis, _ = shared_basis(torch.cat(matrices, dim=1), norm, 9)
    for i, w in enumerate(matrices):
        c = refit_coefficients(basis, w, norm)
        expected = v[:9, 10 * i : 10 * i + 10]
        signs = (c * expected).sum(dim=1).sign()[:, None]
        other = refit_coefficients(basis, matrices[1 - i], norm)
        signs = torch.where(signs == 0, (other * expected).sum(dim=1).sign()[:, None], signs)
        assert torch.allclose(c * signs, expected, atol=1e-12)
    # and the formula of METHODS §3.5 itself
    g = norm.moment
    formula = torch.linalg.solve(basis.T @ g @ basis, basis.T @ g @ matrices[0])
    assert torch.allclose(refit_coefficients(basis, matrices[0], norm), formula, atol=1e-10)


def test_refit_per_layer_is_never_worse_and_much_better_where_inputs_differ() -> None:
    common = matrix(48, 32, 0)
    matrices = [common + 0.7 * matrix(48, 32, 1 + i) for i in range(2)]
    sizes = torch.logspace(-1, 1, 48, dtype=torch.float64)
    inputs = [matrix(500, 48, i) * sizes[torch.randperm(48, generator=generator(i))] for i in (10, 20)]
    norms = [metric_of(x.T @ x) for x in inputs]
    own = factorize(matrices, norms, 13, refit="per_layer")
    group = factorize(matrices, norms, 13, refit="group")
    assert all(a <= b for a, b in zip(own.errors, group.errors, strict=True))
    assert own.error < 0.6 * group.error


def test_members_may_differ_in_output_width() -> None:
    matrices, norm = [matrix(18, d, d) for d in (3, 11, 7)], metric(18, 90)
    factors = factorize(matrices, [norm] * 3, 8)
    assert [tuple(c.shape) for c in factors.coefficients] == [(8, 3), (8, 11), (8, 7)]
    assert sum(factors.errors) == pytest.approx(float(factors.spectrum[8:].sum()), rel=1e-8)


def test_ladder_climbs_only_as_far_as_it_must() -> None:
    full = matrix(200, 12)
    assert metric_of(full.T @ full).rung == "as_is"
    few = matrix(5, 12)
    assert metric_of(few.T @ few).rung == "epsilon"
    # float32 sums of few rows have small negative eigenvalues
    noise = (few.float().T @ few.float()).double() - 5e-6 * float((few**2).mean()) * torch.eye(12, dtype=torch.float64)
    assert metric_of(noise).rung == "10_epsilon"
    negative = few.T @ few - 0.1 * torch.eye(12, dtype=torch.float64)
    assert metric_of(negative).rung == "eigenvalues"
    assert metric_of(torch.zeros(12, 12)).rung == "identity"


def test_a_dominant_mean_in_float32_does_not_cost_an_eigenproblem() -> None:
    x = matrix(60, 400) + 100.0
    exact = x.T @ x / 60
    noise = matrix(400, 400, 7) * float(exact.diagonal().mean()) * 1e-6  # as many float32 sums leave it
    norm = metric_of((exact + (noise + noise.T) / 2).float())
    assert norm.rung == "rounding"
    assert float((norm.moment - exact).diagonal().amax() / exact.diagonal().mean()) < 3e-4
    assert metric_of(exact).rung == "epsilon", "float64 has no such noise"


@pytest.mark.parametrize("shift", [0.0, -0.1])
def test_roots_reproduce_the_regularised_moment(shift: float) -> None:
    few = matrix(5, 12)
    norm = metric_of(few.T @ few + shift * torch.eye(12, dtype=torch.float64))
    assert torch.allclose(norm.root.T @ norm.root, norm.moment, atol=1e-10)
    assert float(torch.linalg.eigvalsh(norm.moment).amin()) > 0
    right = matrix(12, 3, 4)
    assert torch.allclose(norm.root @ norm.solve(right), right, atol=1e-6)


def test_directions_that_calibration_never_showed_fall_back_to_the_weights() -> None:
    x = matrix(6, 32)
    w = matrix(32, 24, 3)
    norm = metric_of(x.T @ x)
    factors = factorize([w], [norm], 16)
    seen = x @ (w - factors.basis @ factors.coefficients[0])
    assert float(seen.norm() / (x @ w).norm()) < 1e-4, "six directions fit into rank 16"
    relative = float((w - factors.basis @ factors.coefficients[0]).norm() / w.norm())
    plain = factorize([w], [identity_metric(32)], 16)
    best = float((w - plain.basis @ plain.coefficients[0]).norm() / w.norm())
    assert relative < 2 * best, "the rest of the rank is not spent on noise"


def test_rank_beyond_that_of_the_weights_is_left_out() -> None:
    w = matrix(20, 3) @ matrix(3, 15, 1)
    factors = factorize([w], [identity_metric(20)], 9)
    assert factors.rank == 3
    assert torch.allclose(factors.basis @ factors.coefficients[0], w, atol=1e-10)


def test_balancing_changes_scales_and_not_products() -> None:
    factors = factorize([matrix(16, 12, 1), matrix(16, 9, 2)], [metric(16, 100)] * 2, 7)
    even = balanced(factors)
    for a, b in zip(factors.coefficients, even.coefficients, strict=True):
        assert torch.allclose(factors.basis @ a, even.basis @ b, atol=1e-12)
    rows = torch.cat(even.coefficients, dim=1).norm(dim=1)
    assert torch.allclose(rows, even.basis.norm(dim=0))
    zero = balanced(factorize([torch.zeros(4, 4, dtype=torch.float64)], [identity_metric(4)], 2))
    assert torch.isfinite(zero.basis).all() and torch.isfinite(zero.coefficients[0]).all()


def test_two_sided_error_is_the_best_that_the_rank_allows() -> None:
    w, g = matrix(12, 9), metric(12, 40)
    f = metric_of(torch.diag(torch.logspace(-3, 2, 9, dtype=torch.float64)))
    root = f.root.T
    factors = factorize([w], [g], 4, targets=[Target(w @ root, g)])
    best = torch.linalg.svdvals(g.root @ w @ root)[4:].square().sum()
    assert factors.error == pytest.approx(float(best), rel=1e-8)
    # F alone says as much pulled back to the input, W F Wᵀ
    other = factorize([w], [g], 4, targets=[Target(metric_of(w @ f.moment @ w.T).root.T, g)])
    assert squared_norm((w - other.basis @ other.coefficients[0]) @ root, g.moment) < 1.001 * factors.error
    one_sided = factorize([w], [g], 4)
    assert squared_norm((w - one_sided.basis @ one_sided.coefficients[0]) @ root, g.moment) > 1.5 * factors.error


def test_identity_roots_change_nothing_and_full_rank_is_exact() -> None:
    ws, g = [matrix(10, 6), matrix(10, 7, 1)], metric(10, 30)

    def of(matrices: list[Tensor], norm: Metric, roots: list[Tensor]) -> list[Target]:
        return [Target(w @ root, norm) for w, root in zip(matrices, roots, strict=True)]

    eyes = [torch.eye(6, dtype=torch.float64), torch.eye(7, dtype=torch.float64)]
    plain, weighted = factorize(ws, [g, g], 5), factorize(ws, [g, g], 5, targets=of(ws, g, eyes))
    for a, b in zip(plain.coefficients, weighted.coefficients, strict=True):
        assert torch.allclose(plain.basis @ a, weighted.basis @ b, atol=1e-10)
    f = [metric(6, 20, 7).root.T, metric(7, 20, 8).root.T]
    full = factorize(ws, [g, g], 10, targets=of(ws, g, f))
    assert all(torch.allclose(full.basis @ c, w, atol=1e-8) for w, c in zip(ws, full.coefficients, strict=True))


def test_a_diagonal_norm_weighs_every_input_by_itself() -> None:
    scales = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    made = diagonal_metric(scales)
    assert torch.allclose(made.root @ made.root, made.moment) and float(made.moment[0, 0]) > 0
    w = torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
    factors = factorize([w], [made], 1)
    # 4 * 0.5 is the largest although 0.5 is the smallest weight
    assert (factors.basis @ factors.coefficients[0]).abs().argmax() == 8


def test_a_refit_to_drifted_inputs_is_least_squares() -> None:
    x = matrix(200, 8)
    drifted = x + 0.3 * matrix(200, 8, 5) @ matrix(8, 8, 6)
    w, basis = matrix(8, 6, 1), matrix(8, 3, 2)
    own, cross = metric_of(drifted.T @ drifted / 200), drifted.T @ x / 200
    c = refit_coefficients(basis, w, own, cross)
    assert torch.allclose(c, torch.linalg.lstsq(drifted @ basis, x @ w).solution, atol=1e-9)
    # nothing has drifted: the ordinary refit
    same = metric_of(x.T @ x / 200)
    assert torch.allclose(
        refit_coefficients(basis, w, same, same.moment), refit_coefficients(basis, w, same), atol=1e-9
    )
