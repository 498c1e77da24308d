"""A split of which other targets are asked, as of fewer classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..task import Batch, Split, TargetsInParts


class ChangedSplit:
    """Some samples of a split, with targets that are made of its own.

    Args:
        split: that the samples come from.
        change: targets [N, ...] -> targets [N, ...], sample by sample.
        rows: int64, of the samples that stay, ascending; all if None.
    """

    def __init__(self, split: Split, change: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> None:
        self._split, self._change = split, change
        self._rows = torch.arange(len(split)) if rows is None else rows
        if hasattr(split, "largest_batch"):
            self.largest_batch = split.largest_batch
        if isinstance(split, TargetsInParts):
            self.targets_of = self._targets_of

    @property
    def targets(self) -> Tensor:
        """Changed, [len, ...]."""
        return self._change(self._split.targets[self._rows])

    def _targets_of(self, rows: Sequence[int]) -> Tensor:
        """See `TargetsInParts`."""
        assert isinstance(self._split, TargetsInParts)
        return self._change(self._split.targets_of(self._rows[torch.as_tensor(rows)].tolist()))

    @cached_property
    def sample_digests(self) -> Sequence[bytes]:
        """Those of the samples that are left."""
        whole = self._split.sample_digests
        return [whole[row] for row in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        found = self._split.batch(self._rows[torch.as_tensor(indices)])
        return Batch(found.inputs, self._change(found.targets))
