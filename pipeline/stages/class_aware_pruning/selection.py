"""Which units go in one iteration: how many from which group, the criterion only ordering them within the group."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...analysis.channels.groups import ChannelGroup, Channels
from .config import ClassAwarePruningConfig
from .criteria import UnitScores


@dataclass(frozen=True)
class Chunk:
    """Units of one group that go together, so that the width stays a multiple of `round_to`.

    Attributes:
        group: name.
        units: indices.
        key: chunks with smaller keys go first; within a group keys never fall.
        score: largest score of the units.
    """

    group: str
    units: tuple[int, ...]
    key: tuple[float, float]
    score: float


@dataclass(frozen=True)
class Selection:
    """What one iteration removes.

    Attributes:
        removed: units by group; groups that lose nothing are left out.
        threshold: scores at or above it stay; None without a threshold.
        candidates: units that qualified.
        cap: most units that this iteration may remove, None without a limit.
    """

    removed: Mapping[str, Tensor]
    threshold: float | None
    candidates: int
    cap: int | None


def least_units(group: ChannelGroup, original: int, config: ClassAwarePruningConfig) -> int:
    """Units that `group` keeps: the share `min_width` of `original`, 2 % and 4 filters at least."""
    share = math.ceil(round(max(0.02, config.min_width) * original, 9))
    return min(original, max(1, share, math.ceil(4 / group.unit_width)))


def step_units(group: ChannelGroup, original: int, config: ClassAwarePruningConfig) -> int:
    """Units in one step, so that every producer's channels of the group stay a multiple of `round_to`."""
    multiple = config.multiple(original * group.unit_width)
    widths = {group.members[(path, "out")].shape[1] for path in group.producers}
    return math.lcm(*(multiple // math.gcd(multiple, width) for width in widths))


def removable(group: ChannelGroup, original: int, config: ClassAwarePruningConfig) -> list[int]:
    """Sizes of the chunks that may go, in order: first down to a multiple of the step, then step by step."""
    least, step, now = least_units(group, original, config), step_units(group, original, config), group.units
    sizes: list[int] = []
    while True:
        size = now % step or step
        if now - size < least:
            return sizes
        sizes.append(size)
        now -= size


def smallest_macs(channels: Channels, original: Mapping[str, int], config: ClassAwarePruningConfig) -> int:
    """MACs of the layers when every group has its least width."""
    return channels.macs({g.name: sum(removable(g, original[g.name], config)) for g in channels.groups})


def select(
    channels: Channels,
    scores: Mapping[str, UnitScores],
    original: Mapping[str, int],
    full_scale: float,
    mac_limit: int | None,
    config: ClassAwarePruningConfig,
) -> Selection:
    """Chooses the units of one iteration.

    Args:
        channels: of the model at hand.
        scores: per group.
        original: units of each group before the first iteration.
        full_scale: what `threshold_frac` is a share of.
        mac_limit: with a target, MACs of the layers to go down to, no further than necessary; else None.
        config: see there.
    """
    threshold = None
    if mac_limit is None and config.mode != "percent_only":
        threshold = config.threshold_frac * full_scale
    key = _target_key(channels, original, config) if mac_limit is not None else _score_key
    chunks = [c for g in channels.groups for c in _chunks(g, scores[g.name], original[g.name], config, key)]
    chunks.sort(key=lambda chunk: chunk.key)
    if threshold is not None:
        chunks = [chunk for chunk in chunks if chunk.score < threshold]
    candidates = sum(len(chunk.units) for chunk in chunks)
    cap = None
    if config.mode != "threshold_only" and (mac_limit is None or config.target_steps is None):
        cap = max(1, int(config.max_frac_per_iter * sum(g.units for g in channels.groups)))
        chunks = _first(chunks, cap)
    if mac_limit is not None:
        chunks = _enough(chunks, channels, mac_limit)
    removed: dict[str, list[int]] = {}
    for chunk in chunks:
        removed.setdefault(chunk.group, []).extend(chunk.units)
    return Selection({name: torch.tensor(sorted(units)) for name, units in removed.items()}, threshold, candidates, cap)


_Key = Callable[[ChannelGroup, UnitScores, tuple[int, ...], int], tuple[float, float]]


def _score_key(group: ChannelGroup, scores: UnitScores, units: tuple[int, ...], gone: int) -> tuple[float, float]:
    """Scores compared across layers; ties, which class counts have many of, by the smaller norm (METHODS §1.4)."""
    del group, gone
    return float(scores.score[list(units)].max()), float(scores.size[list(units)].mean())


def _target_key(channels: Channels, original: Mapping[str, int], config: ClassAwarePruningConfig) -> _Key:
    if config.allocation == "equal_share":

        def share(group: ChannelGroup, scores: UnitScores, units: tuple[int, ...], gone: int) -> tuple[float, float]:
            before = original[group.name] - group.units
            return (before + gone) / original[group.name], float(scores.score[list(units)].max())

        return share
    whole = channels.macs({})

    def loss(group: ChannelGroup, scores: UnitScores, units: tuple[int, ...], gone: int) -> tuple[float, float]:
        del gone
        saved = (whole - channels.macs({group.name: len(units)})) or 1
        return float(scores.loss[list(units)].sum()) / saved, float(scores.score[list(units)].max())

    return loss


def _chunks(
    group: ChannelGroup, scores: UnitScores, original: int, config: ClassAwarePruningConfig, key_of: _Key
) -> list[Chunk]:
    # stable sorts, the more important key last
    order = torch.argsort(scores.size, stable=True)
    order = order[torch.argsort(scores.score[order], stable=True)]
    chunks, start, last = list[Chunk](), 0, (-math.inf, -math.inf)
    for size in removable(group, original, config):
        units = tuple(order[start : start + size].tolist())
        start += size
        last = max(last, key_of(group, scores, units, start))
        chunks.append(Chunk(group.name, units, last, float(scores.score[list(units)].max())))
    return chunks


def _first(chunks: list[Chunk], cap: int) -> list[Chunk]:
    """The first chunks with `cap` units together; one at least, else `round_to` could bring everything to a halt."""
    taken, total = list[Chunk](), 0
    for chunk in chunks:
        if taken and total + len(chunk.units) > cap:
            break
        taken.append(chunk)
        total += len(chunk.units)
    return taken


def _enough(chunks: list[Chunk], channels: Channels, mac_limit: int) -> list[Chunk]:
    """The fewest of the first chunks with which the layers' MACs are within the limit; all of them if none suffices.

    Of these, what can stay without leaving the limit stays, the last first: what the last chunk overshoots.
    """

    def within(taken: list[Chunk]) -> bool:
        removed: dict[str, int] = {}
        for chunk in taken:
            removed[chunk.group] = removed.get(chunk.group, 0) + len(chunk.units)
        return channels.macs(removed) <= mac_limit

    low = bisect_left(range(len(chunks)), True, key=lambda count: within(chunks[:count]))
    taken, needed = chunks[:low], set[str]()
    if not within(taken):
        return taken
    for chunk in reversed(chunks[:low]):
        # chunks of one group go in order: one that has to go takes all before it along
        if chunk.group not in needed:
            fewer = [other for other in taken if other is not chunk]
            if within(fewer):
                taken = fewer
            else:
                needed.add(chunk.group)
    return taken
