"""From candidate groups to factors: the byte budget, the decision to share, and the report on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..errors import StageError
from ..graph import Layer
from ..stage import Json
from .factorization import Factors, Metric, Refit, factorize, rank_for, saves_weights
from .grouping import Candidate, Division, divide

MOMENT_BYTES = 2**31
"""Second moments that one pass over the calibration data may keep; more groups take more passes."""


@dataclass(frozen=True)
class Solved:
    """A group and its factors; None where no rank saves weights, so that its members stay dense."""

    group: Candidate
    factors: Factors | None


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
        rank = rank_for(keep, group.fan_in, group.widths)
        align = self.align if self.align is not None else (8 if rank >= 64 else 1)
        rank = max(1, rank // align * align)
        return rank if saves_weights(rank, group.fan_in, group.widths) else None


def solve(
    candidate: Candidate,
    matrices: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    budget: Budget,
    share: Literal["auto", "always"],
    refit: Refit,
    output_roots: Mapping[str, Tensor] | None = None,
) -> tuple[Division, list[Solved]]:
    """Factorizes one candidate, together or in parts.

    The errors that decide are those of the finished factors: per member, in the norm of that member's own
    input, after the refit. So they can be compared between one basis and several.

    Args:
        candidate: what may share.
        matrices: per member W [d_in, d_out], float64.
        metrics: per member the norm of its input; one object for members with the same input.
        budget: see `Budget`.
        share: let the errors decide, or always share.
        refit: see `factorize`.
        output_roots: per member, for errors that are weighted on both sides.

    Raises:
        StageError: the eigenvalue problem has no solution; names the layers.
    """
    keep = budget.keep(candidate)
    done: dict[tuple[str, ...], Factors | None] = {}

    def factors_of(group: Candidate) -> Factors | None:
        paths = tuple(layer.path for layer in group.members)
        if paths not in done:
            rank = budget.rank(group, keep)
            done[paths] = None if rank is None else factors_at(group, rank, matrices, metrics, refit, output_roots)
        return done[paths]

    def error_of(group: Candidate) -> float:
        factors = factors_of(group)
        return math.inf if factors is None else factors.error

    if share == "auto":
        division = divide(candidate, error_of)
    else:
        error = error_of(candidate)
        division = Division((candidate,), error, error, None)
    return division, [Solved(group, factors_of(group)) for group in division.groups]


def factors_at(
    group: Candidate,
    rank: int,
    matrices: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    refit: Refit,
    output_roots: Mapping[str, Tensor] | None,
) -> Factors:
    """Factorizes `group` at `rank`; arguments as for `solve`.

    Raises:
        StageError: the eigenvalue problem has no solution; names the layers.
    """
    paths = [layer.path for layer in group.members]
    roots = None if output_roots is None else [output_roots[path] for path in paths]
    try:
        return factorize([matrices[p] for p in paths], [metrics[p] for p in paths], rank, refit, roots)
    except LinAlgError as error:
        raise StageError(
            f"basis_sharing: no factors found for {', '.join(paths)}: {error}; leave one of them out "
            "with layers.exclude, or calibrate on more data"
        ) from error


def passes(
    candidates: Sequence[Candidate], inputs: bool = True, outputs: bool = False, limit: int = MOMENT_BYTES
) -> Iterator[list[Candidate]]:
    """Cuts `candidates` into runs whose second moments (float32) fit into `limit` bytes.

    Args:
        candidates: in the order of execution.
        inputs: a matrix [d_in, d_in] is kept per different input.
        outputs: a matrix [d_out, d_out] is kept per layer.
        limit: of a run; a candidate that is larger by itself makes a run of its own.
    """
    run: list[Candidate] = []
    held: set[object] = set()
    size = 0
    for candidate in candidates:

        def added(held: set[object], candidate: Candidate = candidate) -> int:
            fresh = {layer.input_key for layer in candidate.members} - held
            of_outputs = sum(width**2 for width in candidate.widths) if outputs else 0
            return 4 * (of_outputs + (candidate.fan_in**2 * len(fresh) if inputs else 0))

        if run and size + added(held) > limit:
            yield run
            run, held, size = [], set(), 0
        size += added(held)
        run.append(candidate)
        held |= {layer.input_key for layer in candidate.members}
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
