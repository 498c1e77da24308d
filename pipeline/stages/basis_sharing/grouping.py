"""Which layers may have one basis: readers of one tensor, neighbours of one role, or both (METHODS §3.3)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from ...analysis.layers import KINDS, Layer, ModelGraph, Skipped
from ...errors import RecipeError, StageError

GroupMode: TypeAlias = Literal["matrix", "layers", "readers", "readers_and_layers"]


@dataclass(frozen=True)
class Candidate:
    """Layers that could share a basis: rows are neighbouring places of the network, columns its readers."""

    rows: tuple[tuple[Layer, ...], ...]

    @property
    def members(self) -> tuple[Layer, ...]:
        """All layers, place by place."""
        return tuple(layer for row in self.rows for layer in row)

    @property
    def fan_in(self) -> int:
        """d_in, equal for all members."""
        return self.rows[0][0].fan_in

    @property
    def widths(self) -> tuple[int, ...]:
        """d_out of every member."""
        return tuple(layer.output_width for layer in self.members)

    def splits(self) -> list[tuple[Candidate, ...]]:
        """The ways to cut it once: between places in the middle, and between readers."""
        found: list[tuple[Candidate, ...]] = []
        if len(self.rows) > 1:
            half = len(self.rows) // 2
            found.append((Candidate(self.rows[:half]), Candidate(self.rows[half:])))
        if len(self.rows[0]) > 1:
            columns = zip(*self.rows, strict=True)
            found.append(tuple(Candidate(tuple((layer,) for layer in column)) for column in columns))
        return found


@dataclass(frozen=True)
class Division:
    """How a candidate is cut into groups.

    Attributes:
        groups: the parts; one part means that all share.
        error: sum of the parts' errors.
        joint_error: error with one basis for all.
        separate_error: error of the best way to cut; None if there is nothing to cut.
    """

    groups: tuple[Candidate, ...]
    error: float
    joint_error: float
    separate_error: float | None


def divide(candidate: Candidate, error_of: Callable[[Candidate], float]) -> Division:
    """Shares where that is better at equal bytes: one basis if ``E_share < E_sep``, else cut (METHODS §3.3).

    Args:
        candidate: what could share.
        error_of: squared error of one basis for all members at the byte budget of those members.
    """
    joint = error_of(candidate)
    separate: tuple[float, tuple[Candidate, ...]] | None = None
    for parts in candidate.splits():
        divisions = [divide(part, error_of) for part in parts]
        error = sum(division.error for division in divisions)
        if separate is None or error < separate[0]:
            separate = (error, tuple(group for division in divisions for group in division.groups))
    if separate is None:
        return Division((candidate,), joint, joint, None)
    if joint < separate[0]:
        return Division((candidate,), joint, joint, separate[0])
    return Division(separate[1], separate[0], joint, separate[0])


def candidates(layers: Iterable[Layer], mode: GroupMode, size: int, private: Sequence[str] = ()) -> list[Candidate]:
    """Cuts `layers` into candidate groups; every layer is in exactly one.

    Members have equal input width, and for convolutions equal kernels; stride, padding, dilation and output
    width may differ. Neighbours follow each other in the order of execution, `size` of them to a group; the
    last group of a role may be shorter.

    Args:
        layers: in the order of execution.
        mode: what may share.
        size: how many neighbouring places.
        private: glob patterns over paths of layers that share with nobody.
    """
    by_reader = mode in ("readers", "readers_and_layers")
    rows: dict[object, list[Layer]] = {}
    for layer in layers:
        alone = any(fnmatchcase(layer.path, pattern) for pattern in private)
        key = (layer.source, layer.shape_class) if by_reader and not alone else layer.path
        rows.setdefault(key, []).append(layer)
    if mode in ("matrix", "readers"):
        return [Candidate((tuple(row),)) for row in rows.values()]
    runs: dict[object, list[tuple[Layer, ...]]] = {}
    for row in rows.values():
        alone = any(fnmatchcase(row[0].path, pattern) for pattern in private)
        signature = row[0].path if alone else (row[0].shape_class, *(layer.role for layer in row))
        runs.setdefault(signature, []).append(tuple(row))
    found = [Candidate(tuple(run[i : i + size])) for run in runs.values() for i in range(0, len(run), size)]
    return sorted(found, key=lambda candidate: candidate.members[0].order)


def select(
    graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], min_width: int
) -> tuple[list[Layer], list[Skipped]]:
    """The layers to factorize, and the reasons for those that stay.

    The layer that gives the logits and a convolutional stem take part only if `include` has their very path.

    Args:
        graph: the model's structure.
        include: glob patterns over module paths; none means all.
        exclude: likewise, wins over `include`.
        min_width: layers with fewer rows or columns than this stay.

    Raises:
        StageError: a pattern matches no layer that multiplies with a matrix.
    """
    for pattern in (*include, *exclude):
        if not _matches(graph, pattern):
            raise StageError(f"basis_sharing: {_nothing_matches(pattern, graph)}")
    chosen, left = [], list(graph.skipped)
    for layer in graph.layers:
        reason = _reason_to_stay(layer, include, exclude, min_width)
        if reason is None:
            chosen.append(layer)
        else:
            left.append(Skipped(layer.path, reason))
    return chosen, left


def _reason_to_stay(layer: Layer, include: Sequence[str], exclude: Sequence[str], min_width: int) -> str | None:
    if any(fnmatchcase(layer.path, pattern) for pattern in exclude):
        return "excluded by the recipe"
    if include and not any(fnmatchcase(layer.path, pattern) for pattern in include):
        return "not included by the recipe"
    if layer.path not in include:
        if layer.logits:
            return "gives the logits"
        if layer.stem:
            return "the stem"
    if min(layer.fan_in, layer.output_width) < min_width:
        return f"narrower than min_width {min_width}"
    return None


def check_patterns(
    graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], ranks: Iterable[str], min_width: int
) -> None:
    """Refuses patterns that mean nothing in a model, before anything is computed.

    Args:
        graph: the base model's structure.
        include: see `select`.
        exclude: see `select`.
        ranks: patterns that have a rank of their own.
        min_width: see `select`.

    Raises:
        RecipeError: a pattern matches no layer, with the nearest paths, or only layers that stay, with the reasons.
    """
    for key, patterns in (("layers.include", include), ("layers.exclude", exclude), ("rank", ranks)):
        for pattern in patterns:
            matched = _matches(graph, pattern)
            if not matched:
                raise RecipeError(f"basis_sharing.{key}: {_nothing_matches(pattern, graph)}")
            reasons = {
                x.path: x.reason if isinstance(x, Skipped) else _reason_to_stay(x, include, exclude, min_width)
                for x in matched
            }
            if key != "layers.exclude" and None not in reasons.values():
                listed = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:4])
                raise RecipeError(
                    f"basis_sharing.{key}: none of the {len(reasons)} layers that {pattern!r} matches can be "
                    f"factorized ({listed}{' ...' if len(reasons) > 4 else ''}): name others, or leave the pattern out"
                )


def _matches(graph: ModelGraph, pattern: str) -> list[Layer | Skipped]:
    every: list[Layer | Skipped] = [*graph.layers, *graph.skipped]
    return [x for x in every if fnmatchcase(x.path, pattern)]


def _nothing_matches(pattern: str, graph: ModelGraph) -> str:
    paths = [x.path for x in _matches(graph, "*")]
    text = f"the pattern {pattern!r} matches no {KINDS} of the model"
    if not paths:
        return f"{text}, which has none: leave the stage out"
    near = sorted(paths, key=lambda path: -difflib.SequenceMatcher(None, pattern, path).ratio())[:4]
    return f"{text}; the nearest are {', '.join(map(repr, near))}" + (f" of {len(paths)}" if len(paths) > 4 else "")
