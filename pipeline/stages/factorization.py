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
class Factors:
    """One basis and the coefficients of every member.

    Attributes:
        basis: B [d_in, rank].
        coefficients: per member C [rank, d_out].
        spectrum: eigenvalues of the joint problem, descending, [min(d_in, Σ d_out)].
        predicted_error: discarded share of the spectrum: the relative squared error in the group's norm.
        errors: per member ``||X_i (W_i - B C_i) L_i||²`` in its own norm; L_i is 1 without output roots.
        energies: per member ``||X_i W_i L_i||²``.
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
        """Sum of the members' squared errors."""
        return sum(self.errors)


def kept_share(ratio: float) -> Fraction:
    """``1 - ratio`` as written in decimals: a floor must not depend on binary rounding."""
    return 1 - Fraction(str(ratio))


def rank_for(keep: Fraction, d_in: int, d_outs: Sequence[int], align: int = 1) -> int:
    """Largest rank whose factors have at most the share `keep` of the dense weights (METHODS §3.2).

    ``k = floor(keep · d_in · Σd_out / (d_in + Σd_out))``, rounded down to a multiple of `align`, at least 1.

    Args:
        keep: share of the weights that stays.
        d_in: rows of every matrix.
        d_outs: columns of each.
        align: see above.
    """
    total = sum(d_outs)
    rank = int(keep * d_in * total / (d_in + total))
    return max(1, rank // align * align)


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
    d_in, total = matrix.shape
    if total <= d_in:
        product = matrix.T @ metric.moment @ matrix
        values, vectors = _eigh((product + product.T) / 2)
    else:
        whitened = metric.root @ matrix
        values, vectors = _eigh(whitened @ whitened.T)
    values = values.flip(0).clamp(min=0.0)
    rank = max(1, min(rank, int((values > _NEGLIGIBLE * values[0]).sum())))
    chosen = vectors.flip(1)[:, :rank]
    if total <= d_in:
        return matrix @ chosen, values
    return metric.solve(chosen * values[:rank].sqrt()), values


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
    output_roots: Sequence[Tensor] | None = None,
) -> Factors:
    """One basis for all `matrices`, and the coefficients of each.

    With output roots, errors are weighted on both sides: ``tr(Δᵀ G Δ F)``, to second order what the loss grows by
    (METHODS §3.5, item 6). Only the choice of the basis depends on F; the coefficients that are best for it do not.

    Args:
        matrices: per member W_i [d_in, d_out_i], float64.
        metrics: per member the norm of its own input; the same object for members with the same input.
        rank: wanted columns of the basis.
        refit: coefficients from each member's own norm (never worse there), or from the group's.
        output_roots: per member L_i [d_out_i, d_out_i] with ``L Lᵀ = F_i``, the second moment of the loss's gradient
            at its output.
    """
    joint = joint_metric(metrics)
    roots: Sequence[Tensor | None] = [None] * len(matrices) if output_roots is None else output_roots
    weighted = [_times(matrix, root) for matrix, root in zip(matrices, roots, strict=True)]
    basis, spectrum = shared_basis(torch.cat(weighted, dim=1), joint, rank)
    coefficients, errors, energies = [], [], []
    for matrix, metric, root in zip(matrices, metrics, roots, strict=True):
        c = refit_coefficients(basis, matrix, metric if refit == "per_layer" else joint)
        coefficients.append(c)
        errors.append(squared_norm(_times(matrix - basis @ c, root), metric.moment))
        energies.append(squared_norm(_times(matrix, root), metric.moment))
    total = float(spectrum.sum())
    discarded = float(spectrum[basis.shape[1] :].sum())
    predicted = discarded / total if total > 0.0 else 0.0
    return Factors(basis, tuple(coefficients), spectrum, predicted, tuple(errors), tuple(energies))


def _times(matrix: Tensor, root: Tensor | None) -> Tensor:
    return matrix if root is None else matrix @ root


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
