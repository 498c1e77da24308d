"""Dealing samples out to splits, by what they contain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from ..task import SplitName


def stratified_split(
    digests: Sequence[bytes],
    targets: Tensor,
    labels: Sequence[str],
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
) -> dict[SplitName, list[int]]:
    """Deals samples out to splits, class by class, by a hash of `seed` and content, whatever their order.

    Equal samples stay together, even where they carry different classes: they go where their first
    occurrence goes. A class with at least as many different samples as there are splits gets one into every
    split.

    Args:
        digests: of every sample's content.
        targets: class indices int64 [len(digests)].
        labels: class names.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: another seed, another deal.

    Returns:
        Per split the indices of its samples, ascending.

    Raises:
        DataError: a share that is not positive, or a target outside the labels.
    """
    shares: dict[SplitName, float] = dict(
        fractions or {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}
    )
    for name, share in shares.items():
        if not share > 0:
            raise DataError(f"the fraction of {name!r} is {share}; shares are positive: leave the split out")
    same: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        same.setdefault(digest, []).append(row)
    of_class: list[list[tuple[bytes, list[int]]]] = [[] for _ in labels]
    for digest, rows in same.items():
        label = int(targets[rows[0]])
        if not 0 <= label < len(labels):
            raise DataError(f"sample {rows[0]} has class {label}, and there are {len(labels)} labels")
        of_class[label].append((hashlib.blake2b(digest, key=str(seed).encode()).digest(), rows))
    chosen: dict[SplitName, list[int]] = {name: [] for name in shares}
    for groups in of_class:
        groups.sort()
        start = 0
        for name, size in zip(shares, _sizes(len(groups), list(shares.values())), strict=True):
            chosen[name] += [row for _, rows in groups[start : start + size] for row in rows]
            start += size
    return {name: sorted(rows) for name, rows in chosen.items()}


def _sizes(count: int, shares: Sequence[float]) -> list[int]:
    """Divides `count` into whole parts close to `shares`, none of them empty if `count` suffices."""
    ends = [round(count * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    while count >= len(sizes) and 0 in sizes:
        sizes[sizes.index(0)] += 1
        sizes[sizes.index(max(sizes))] -= 1
    return sizes
