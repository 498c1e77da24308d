"""The numerical core of basis sharing: matrices in, one basis and private coefficients out (METHODS §3).

Convention: ``y = x W`` with W [d_in, d_out]; a group's matrices have equal d_in and any d_out. The norm of an
error is that of the activations it causes: ``||X (W - B C)||² = tr(Δᵀ G Δ)`` with the second moment G = XᵀX.
Everything here is float64 and knows nothing of models. Paper: arXiv 2410.03765.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Refit = Literal["per_layer", "group"]

_EPSILON = 1e-6  # METHODS §3.4, relative to the mean eigenvalue of G
_SMALL = 1024
_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: what float64 eigenvectors of a product cannot resolve


@dataclass(frozen=True)
class Metric:
    """A second moment made positive definite, with a root.

    Attributes:
        moment: G [d, d], what errors are measured with.
        root: S [d, d] with ``SᵀS = G``, upper triangular unless `rung` is ``"eigenvalues"``.
        rung: how far down the ladder of METHODS §3.4 it took: ``"as_is" | "epsilon" | "10_epsilon" |
            "rounding" | "eigenvalues" | "identity" | "diagonal"``.
    """

    moment: Tensor
    root: Tensor
    rung: str

    def solve(self, right: Tensor) -> Tensor:
        """``S⁻¹ right``, by substitution where S is triangular."""
        if self.rung == "eigenvalues":
            solution: Tensor = torch.linalg.solve(self.root, right)
        else:
            solution = torch.linalg.solve_triangular(self.root, right, upper=True)
        return solution

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``S⁻ᵀ right``."""
        if self.rung == "eigenvalues":
            solution: Tensor = torch.linalg.solve(self.root.T, right)
        else:
            solution = torch.linalg.solve_triangular(self.root.T, right, upper=False)
        return solution


@dataclass(frozen=True)
class Target:
    """What a basis should span, and the norm in which it falls short of it.

    With plain errors that is a member's W in the norm of its input. Where the loss weighs the outputs by F, it is any M
    with ``M Mᵀ = W F Wᵀ``: the error ``tr(Δᵀ G Δ F)`` of ``Δ = W - B C`` is then ``||S (M - B C')||²``, because
    the best coefficients are a projection of whatever stands on the right.
    """

    matrix: Tensor
    """M [d_in, any], float64."""
    metric: Metric
    """S and G."""


@dataclass(frozen=True)
class Factors:
    """One basis and the coefficients of every member.

    Attributes:
        basis: B [d_in, rank].
        coefficients: per member C [rank, d_out].
        spectrum: eigenvalues of the joint problem, descending, [min(d_in, Σ d_out)].
        predicted_error: discarded share of the spectrum: the relative squared error in the group's norm.
        errors: per target ``||S (M - B C)||²``, C the best or the group's for M.
        energies: per target ``||S M||²``.
    """

    basis: Tensor
    coefficients: tuple[Tensor, ...]
    spectrum: Tensor
    predicted_error: float
    errors: tuple[float, ...]
    energies: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return self.basis.shape[1]

    @property
    def error(self) -> float:
        """Sum of the targets' squared errors."""
        return sum(self.errors)


def kept_share(ratio: float) -> Fraction:
    """``1 - ratio`` as written in decimals: a floor must not depend on binary rounding."""
    return 1 - Fraction(str(ratio))


def rank_for(keep: Fraction, d_in: int, d_outs: Sequence[int], align: int = 1) -> int:
    """Largest rank whose factors have at most the share `keep` of the dense weights (METHODS §3.2).

    ``k = floor(keep · d_in · Σd_out / (d_in + Σd_out))``, at least 1, aligned.

    Args:
        keep: share of the weights that stays.
        d_in: rows of every matrix.
        d_outs: columns of each.
        align: see `aligned`.
    """
    total = sum(d_outs)
    return aligned(max(1, int(keep * d_in * total / (d_in + total))), align)


def aligned(rank: int, align: int) -> int:
    """`rank` rounded down to a multiple of `align`, as it is below that: there would be nothing left of it."""
    return rank // align * align or rank


def saves_weights(rank: int, d_in: int, d_outs: Sequence[int]) -> bool:
    """Whether factors of `rank` have fewer weights than the dense matrices."""
    return rank * (d_in + sum(d_outs)) < d_in * sum(d_outs)


def diagonal_metric(scales: Tensor) -> Metric:
    """The norm of ``S = diag(scales)``: every input column by itself (METHODS §3.11, ASVD and FWSVD).

    Args:
        scales: float64 [d], not negative; zeros become a millionth of the mean.
    """
    mean = float(scales.mean())
    if mean <= 0.0:
        return identity_metric(len(scales), scales.device)
    scales = scales.clamp(min=_EPSILON * mean)
    return Metric(torch.diag(scales**2), torch.diag(scales), "diagonal")


def identity_metric(width: int, device: torch.device | None = None) -> Metric:
    """The plain Frobenius norm."""
    eye = torch.eye(width, dtype=torch.float64, device=device)
    return Metric(eye, eye, "identity")


def metric_of(moment: Tensor) -> Metric:
    """Symmetrises `moment` and finds a root, with as little regularisation as it takes (METHODS §3.4).

    The ladder: Cholesky of G, of G + εI, of G + 10εI, eigenvalues clamped to ε; ε = 1e-6 tr(G)/d. A
    factorization that succeeds with a pivot below ε/10 counts as failed: such a G is singular but for
    rounding, and its inverse root would weigh directions that the data never showed. A float32 G gets one more
    rung before the eigenvalues, the size of its own rounding: where one direction dominates (a mean), that is
    more than 10ε, and the eigenvalues of a few thousand columns take minutes. An all-zero G becomes the identity.

    Args:
        moment: float32 or float64 [d, d], finite.
    """
    g = moment.to(torch.float64)
    g = (g + g.T) / 2
    width = g.shape[0]
    scale = float(g.diagonal().mean())
    if scale <= 0.0:
        return identity_metric(width, g.device)
    epsilon = _EPSILON * scale
    shifts = [("as_is", 0.0), ("epsilon", epsilon), ("10_epsilon", 10 * epsilon)]
    rounding = 4 * torch.finfo(torch.float32).eps * float(g.norm())
    if moment.dtype == torch.float32 and rounding > 10 * epsilon:
        shifts.append(("rounding", rounding))
    for rung, shift in shifts:
        shifted = g.clone()
        shifted.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0 and float(lower.diagonal().amin()) ** 2 >= epsilon / 10:
            return Metric(shifted, lower.T.contiguous(), rung)
    values, vectors = _eigh(g)
    values = values.clamp(min=epsilon)
    return Metric((vectors * values) @ vectors.T, values.sqrt()[:, None] * vectors.T, "eigenvalues")


def joint_metric(metrics: Sequence[Metric]) -> Metric:
    """The norm of a group, ``G = Σ G_i`` over the different inputs of its members."""
    unique = list({id(metric): metric for metric in metrics}.values())
    if len(unique) == 1:
        return unique[0]
    return metric_of(torch.stack([metric.moment for metric in unique]).sum(dim=0))


def spectrum_of(targets: Sequence[Target], metric: Metric) -> Tensor:
    """All eigenvalues σ² of what `shared_basis` solves, descending: each is what one more rank saves."""
    return _eigen(torch.cat([target.matrix for target in targets], dim=1), metric, vectors=False)[0]


def shared_basis(matrix: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The best basis of `rank` columns for `matrix` in the norm of `metric` (METHODS §3.1, §3.5).

    ``B = S⁻¹ U_k Σ_k`` for the singular value decomposition ``S W = U Σ Vᵀ``, from the smaller of two
    symmetric eigenproblems: ``(SW)(SW)ᵀ`` [d_in, d_in], or ``(SW)ᵀ(SW) = WᵀGW``, where B is ``W V_k``.

    Args:
        matrix: W [d_in, Σ d_out], the members side by side.
        metric: the group's norm.
        rank: wanted columns; directions that carry nothing are left out, but one remains.

    Returns:
        B [d_in, k], and all eigenvalues σ² in descending order [min(d_in, Σ d_out)].
    """
    values, vectors = _eigen(matrix, metric)
    rank = max(1, min(rank, int((values > _NEGLIGIBLE * values[0]).sum())))
    chosen = vectors[:, :rank]
    if matrix.shape[1] <= matrix.shape[0]:
        return matrix @ chosen, values
    return metric.solve(chosen * values[:rank].sqrt()), values


def _eigen(matrix: Tensor, metric: Metric, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and vectors of the smaller problem of `shared_basis`."""
    if matrix.shape[1] <= matrix.shape[0]:
        product = matrix.T @ (metric.moment @ matrix)
        product = (product + product.T) / 2
    else:
        whitened = metric.root @ matrix
        product = whitened @ whitened.T
    if not vectors:
        with _few_threads(product.shape[1]):
            alone = torch.linalg.eigvalsh(product)
        return alone.flip(0).clamp(min=0.0), alone
    values, found = _eigh(product)
    return values.flip(0).clamp(min=0.0), found.flip(1)


def refit_coefficients(basis: Tensor, matrix: Tensor, metric: Metric, cross: Tensor | None = None) -> Tensor:
    """The best coefficients for a given basis, ``C = (BᵀGB)⁻¹ BᵀG W`` (METHODS §3.5).

    Solved as the least-squares problem ``min ||S(W - BC)||``, whose condition is the root of the formula's.

    Args:
        basis: B [d_in, k].
        matrix: W [d_in, d_out].
        metric: the norm.
        cross: ``X̃ᵀX`` [d_in, d_in], where the layer's input has become X̃, with G its second moment, and its output is
            to stay ``X W``: then C is the least-squares solution of ``X̃ B C = X W``.

    Returns:
        C [k, d_out].
    """
    whitened = metric.root @ basis
    # unit columns first: those of B differ in size by the root of the spectrum's range
    lengths = whitened.norm(dim=0)
    scale = 1.0 / lengths.where(lengths > 0, torch.ones_like(lengths))
    with _few_threads(whitened.shape[1]):
        q, r = torch.linalg.qr(whitened * scale)
    target = metric.root @ matrix if cross is None else metric.solve_transposed(cross @ matrix)
    if float(r.diagonal().abs().amin()) > _NEGLIGIBLE:
        solution = torch.linalg.solve_triangular(r, q.T @ target, upper=True)
    else:
        solution = torch.linalg.pinv(whitened * scale, rtol=_NEGLIGIBLE) @ target
    coefficients: Tensor = scale[:, None] * solution
    return coefficients


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending, and eigenvectors, of a symmetric matrix."""
    with _few_threads(matrix.shape[1]):
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


@contextmanager
def _few_threads(columns: int) -> Iterator[None]:
    """One thread for small decompositions.

    They gain little from more, and on a busy machine threads that wait for each other made an eigenproblem of 512
    columns take 12 s instead of 0.1 (2 cores, load 5).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if columns <= _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def squared_norm(matrix: Tensor, moment: Tensor) -> float:
    """``tr(Mᵀ G M)``: the squared size of what `matrix` adds to the activations."""
    return float((matrix * (moment @ matrix)).sum().clamp(min=0.0))


def factorize(
    matrices: Sequence[Tensor],
    metrics: Sequence[Metric],
    rank: int,
    refit: Refit = "per_layer",
    targets: Sequence[Target] | None = None,
) -> Factors:
    """One basis for all `matrices`, and the coefficients of each.

    Args:
        matrices: per member W_i [d_in, d_out_i], float64.
        metrics: per member the norm of its own input; the same object for members with the same input.
        rank: wanted columns of the basis.
        refit: coefficients from each member's own norm (never worse there), or from the group's.
        targets: what the basis should span; default the matrices. Their norms are among `metrics`. The best
            coefficients for a basis do not depend on them.
    """
    joint = joint_metric(metrics)
    goals = [Target(*pair) for pair in zip(matrices, metrics, strict=True)] if targets is None else targets
    basis, spectrum = shared_basis(torch.cat([goal.matrix for goal in goals], dim=1), joint, rank)
    coefficients: list[Tensor | None] = [None] * len(matrices)
    errors = [0.0] * len(goals)
    for metric in {id(metric): metric for metric in metrics}.values():
        mine = [i for i, other in enumerate(metrics) if other is metric]
        aims = [i for i, goal in enumerate(goals) if goal.metric is metric] if targets is not None else []
        # one decomposition for all that is fitted in one norm
        together = [matrices[i] for i in mine] + [goals[i].matrix for i in aims]
        fitted = refit_coefficients(basis, torch.cat(together, dim=1), metric if refit == "per_layer" else joint)
        widths = [matrix.shape[1] for matrix in together]
        parts = torch.split(fitted, widths, dim=1)
        for i, c in zip(mine, parts, strict=False):
            coefficients[i] = c.contiguous()
        judged = zip(mine, parts, strict=True) if targets is None else zip(aims, parts[len(mine) :], strict=True)
        for i, c in judged:
            errors[i] = squared_norm(goals[i].matrix - basis @ c, metric.moment)
    energies = tuple(squared_norm(goal.matrix, goal.metric.moment) for goal in goals)
    found = tuple(c for c in coefficients if c is not None)
    return Factors(basis, found, spectrum, discarded_share(spectrum, basis.shape[1]), tuple(errors), energies)


def discarded_share(spectrum: Tensor, rank: int) -> float:
    """What a basis of `rank` leaves of the sum of `spectrum`, descending: the relative squared error."""
    total = float(spectrum.sum())
    return float(spectrum[rank:].sum()) / total if total > 0.0 else 0.0


def balanced(factors: Factors) -> Factors:
    """The same products with every basis vector as long as its row of coefficients.

    Training and low-precision formats see both factors at one scale; the product is unchanged.
    """
    rows = torch.cat(factors.coefficients, dim=1).norm(dim=1)
    columns = factors.basis.norm(dim=0)
    usable = (rows > 0) & (columns > 0)
    scale = torch.where(usable, (rows / columns.where(usable, torch.ones_like(columns))).sqrt(), torch.ones_like(rows))
    return Factors(
        factors.basis * scale,
        tuple(c / scale[:, None] for c in factors.coefficients),
        factors.spectrum,
        factors.predicted_error,
        factors.errors,
        factors.energies,
    )
