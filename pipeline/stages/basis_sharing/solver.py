"""From candidate groups to factors: the byte budget, the decision to share, and the report on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ...analysis.layers import Layer
from ...errors import StageError
from ...stage import Json
from .factorization import (
    Factors,
    Metric,
    Refit,
    Target,
    aligned,
    factorize,
    joint_metric,
    rank_for,
    saves_weights,
    spectrum_of,
)
from .grouping import Candidate, Division, divide

T = TypeVar("T")

MOMENT_BYTES = 2**31
"""Second moments that one pass over the calibration data may keep; more groups take more passes."""


@dataclass(frozen=True)
class Budget:
    """How large factors may be.

    Attributes:
        keep: share of the weights that stays, for a candidate.
        align: what ranks are rounded down to; None: 8 from rank 64 on, where little is lost and vector units
            gain, 1 below.
    """

    keep: Callable[[Candidate], Fraction]
    align: int | None

    def rank(self, group: Candidate, keep: Fraction) -> int | None:
        """Rank of `group` at a share `keep`, None if that saves nothing."""
        if keep >= 1:  # a ratio of 0: factors of as many weights would only be less exact
            return None
        rank = rank_for(keep, group.fan_in, group.widths)
        rank = aligned(rank, self.align if self.align is not None else (8 if rank >= 64 else 1))
        return rank if saves_weights(rank, group.fan_in, group.widths) else None


@dataclass(frozen=True)
class Algebra:
    """What the layers of a candidate are made of, float64.

    Attributes:
        matrices: W [d_in, d_out] by path.
        metrics: the norm of the input by path; one object for layers with the same input.
        targets: what a basis should span, by path; see `Norms.targets`.
        refit: see `factorize`.
    """

    matrices: Mapping[str, Tensor]
    metrics: Mapping[str, Metric]
    targets: Mapping[str, Tensor]
    refit: Refit

    def error(self, group: Candidate, rank: int) -> float:
        """Squared error of one basis for `group`, comparable between one basis and several.

        That of the finished factors: per member, in the norm of that member's own input, after the refit.
        """
        metrics = self._metrics(group)
        targets = self._targets(group)
        if len({id(metric) for metric in metrics}) == 1:
            # in one norm the error is what the spectrum leaves, whatever the coefficients are fitted in
            return float(_solved(group, lambda: spectrum_of(targets, metrics[0]))[rank:].sum())
        return _solved(group, lambda: factorize(self._matrices(group), metrics, rank, self.refit, targets)).error

    def spectrum(self, group: Candidate) -> Tensor:
        """What every rank of a basis for `group` saves, descending."""
        targets = self._targets(group)
        return _solved(group, lambda: spectrum_of(targets, joint_metric(self._metrics(group))))

    def factors(self, group: Candidate, rank: int) -> Factors:
        """Basis and coefficients of `group`.

        Raises:
            StageError: the eigenvalue problem has no solution; names the layers.
        """
        targets = self._targets(group)
        return _solved(group, lambda: factorize(self._matrices(group), self._metrics(group), rank, self.refit, targets))

    def _matrices(self, group: Candidate) -> list[Tensor]:
        return [self.matrices[layer.path] for layer in group.members]

    def _targets(self, group: Candidate) -> list[Target]:
        return [Target(self.targets[layer.path], self.metrics[layer.path]) for layer in group.members]

    def _metrics(self, group: Candidate) -> list[Metric]:
        return [self.metrics[layer.path] for layer in group.members]


def divided(candidate: Candidate, algebra: Algebra, budget: Budget, share: Literal["auto", "always"]) -> Division:
    """Decides which members of `candidate` share a basis.

    Args:
        candidate: what may share.
        algebra: of its members.
        budget: see `Budget`.
        share: let the errors decide, or always share.

    Raises:
        StageError: an eigenvalue problem has no solution; names the layers.
    """
    keep = budget.keep(candidate)
    done: dict[tuple[str, ...], float] = {}

    def error_of(group: Candidate) -> float:
        paths = tuple(layer.path for layer in group.members)
        if paths not in done:
            rank = budget.rank(group, keep)
            done[paths] = math.inf if rank is None else algebra.error(group, rank)
        return done[paths]

    if share == "auto" and len(candidate.members) > 1:
        return divide(candidate, error_of)
    return Division((candidate,), math.nan, math.nan, None)


def _solved(group: Candidate, solve: Callable[[], T]) -> T:
    """What `solve` gives.

    Raises:
        StageError: its eigenvalue problem has no solution; names the layers.
    """
    try:
        return solve()
    except LinAlgError as error:
        paths = ", ".join(layer.path for layer in group.members)
        raise StageError(
            f"basis_sharing: no factors found for {paths}: {error}; leave one of them out "
            "with layers.exclude, or calibrate on more data"
        ) from error


def passes(
    candidates: Sequence[Candidate], kept: Callable[[Candidate], dict[object, int]], limit: int = MOMENT_BYTES
) -> Iterator[list[Candidate]]:
    """Cuts `candidates` into runs whose statistics (float32) fit into `limit` bytes.

    Args:
        candidates: in the order of execution.
        kept: numbers that a candidate's statistics hold, by what they belong to; equal keys are kept once.
        limit: of a run; a candidate that is larger by itself makes a run of its own.
    """
    run: list[Candidate] = []
    held: dict[object, int] = {}
    for candidate in candidates:
        more = kept(candidate)
        if run and 4 * sum((held | more).values()) > limit:
            yield run
            run, held = [], {}
        held |= more
        run.append(candidate)
    if run:
        yield run


def factorized_macs(members: Sequence[Layer], rank: int, merged: bool) -> int:
    """MACs per sample of a group with a basis of `rank`.

    Args:
        members: its layers.
        rank: of the basis.
        merged: members that multiply the same rows with the basis do so once, as after an export that merges
            equal nodes; otherwise each by itself, as PyTorch runs it.
    """
    total, projected = 0, set()
    for layer in members:
        total += layer.rows * rank * layer.output_width
        if not (merged and layer.input_key in projected):
            total += layer.rows * rank * layer.fan_in
        projected.add(layer.input_key)
    return total


def group_report(group: Candidate, factors: Factors, bytes_per_weight: int) -> dict[str, Json]:
    """One row about a factorized group, for the report."""
    members = group.members
    dense = sum(layer.fan_in * layer.output_width for layer in members)
    kept = factors.rank * (group.fan_in + sum(group.widths))
    energy = sum(factors.energies)
    return {
        "members": [layer.path for layer in members],
        "kind": members[0].kind,
        "rank": factors.rank,
        "fan_in": group.fan_in,
        "widths": list(group.widths),
        "predicted_error": factors.predicted_error,
        "measured_error": factors.error / energy if energy > 0.0 else 0.0,
        "member_errors": [e / n if n > 0.0 else 0.0 for e, n in zip(factors.errors, factors.energies, strict=True)],
        "bytes_before": dense * bytes_per_weight,
        "bytes_after": kept * bytes_per_weight,
        "macs_before": sum(layer.macs for layer in members),
        "macs_after": factorized_macs(members, factors.rank, merged=False),
        "macs_after_merged": factorized_macs(members, factors.rank, merged=True),
    }


def decision_report(candidate: Candidate, division: Division, share: str) -> dict[str, Json]:
    """One row about the decision to share, for the report; errors are squared, in calibrated norm."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    alone = len(candidate.members) == 1
    whole = len(division.groups) == 1
    return {
        "members": [layer.path for layer in candidate.members],
        "decision": "alone" if alone else "always" if share == "always" else "share" if whole else "split",
        "groups": [[layer.path for layer in group.members] for group in division.groups],
        "error_shared": finite(division.joint_error),
        "error_separate": finite(division.separate_error),
    }


def summary(rows: Sequence[Mapping[str, Json]]) -> tuple[dict[str, Json], list[str]]:
    """Totals over the rows of `group_report`, and what the report has to say of them."""
    names = ("bytes_before", "bytes_after", "macs_before", "macs_after", "macs_after_merged")
    total: dict[str, Json] = {name: sum(row[name] for row in rows) for name in names}
    total["shared_groups"] = sum(len(row["members"]) > 1 for row in rows)
    notes = []
    if not rows:
        return total, ["no layer was factorized: no rank at this ratio has fewer weights than the dense layers"]
    total["removed_share"] = 1.0 - total["bytes_after"] / total["bytes_before"]
    total["macs_ratio"] = total["macs_after"] / total["macs_before"]
    total["macs_ratio_merged"] = total["macs_after_merged"] / total["macs_before"]
    if total["macs_after"] >= total["macs_before"]:
        notes.append(
            f"MACs of the factorized layers do not fall in PyTorch ({total['macs_ratio']:.3f} of before): a "
            "shared basis saves bytes, and each member multiplies it anew (METHODS §3.8); computed once per "
            "tensor read, as an export that merges equal nodes does, the ratio is "
            f"{total['macs_ratio_merged']:.3f}"
        )
    return total, notes
