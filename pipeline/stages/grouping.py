"""Which layers may have one basis: readers of one tensor, neighbours of one role, or both (METHODS §3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from ..errors import StageError
from ..graph import Layer, ModelGraph, Skipped

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


def candidates(layers: Iterable[Layer], mode: GroupMode, size: int) -> list[Candidate]:
    """Cuts `layers` into candidate groups; every layer is in exactly one.

    Members have equal input width, and for convolutions equal kernels; stride, padding, dilation and output
    width may differ. Neighbours follow each other in the order of execution, `size` of them to a group; the
    last group of a role may be shorter.

    Args:
        layers: in the order of execution.
        mode: what may share.
        size: how many neighbouring places.
    """
    by_reader = mode in ("readers", "readers_and_layers")
    rows: dict[object, list[Layer]] = {}
    for layer in layers:
        key = (layer.source, layer.shape_class) if by_reader else layer.path
        rows.setdefault(key, []).append(layer)
    if mode in ("matrix", "readers"):
        return [Candidate((tuple(row),)) for row in rows.values()]
    runs: dict[object, list[tuple[Layer, ...]]] = {}
    for row in rows.values():
        signature = (row[0].shape_class, *(layer.role for layer in row))
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
        StageError: a pattern matches no Linear or Conv2d.
    """
    paths = [layer.path for layer in graph.layers] + [s.path for s in graph.skipped]
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise StageError(
                f"basis_sharing: the pattern {pattern!r} in `layers` matches no Linear or Conv2d of the "
                f"model; there are {', '.join(repr(path) for path in paths[:8])}{' ...' if len(paths) > 8 else ''}"
            )
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
