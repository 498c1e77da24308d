"""Down to how many MACs an iteration goes, and whether they can be reached at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ...analysis.channels.groups import Channels
from ...errors import StageError
from .config import ClassAwarePruningConfig
from .selection import smallest_macs


@dataclass(frozen=True)
class MacTarget:
    """The target of a run, in MACs of the layers that `channels` counts.

    Attributes:
        config: see there; without a target every limit is None.
        channels: of the model that the iterations begin with.
        dense_macs: of the given model, which the target is a share of.
        fixed: MACs outside the layers that `channels` counts.
    """

    config: ClassAwarePruningConfig
    channels: Channels
    dense_macs: int
    fixed: int

    @property
    def limit(self) -> int | None:
        """MACs of the layers that the target leaves; the rest of the model keeps its own."""
        share = self.config.target
        if share is None:
            return None
        limit = self._limit(1.0 - share)
        return limit if self.config.target_mac_reduction != "auto" else max(limit, self.least)

    @cached_property
    def least(self) -> int:
        """MACs of the layers at their smallest widths."""
        return smallest_macs(self.channels, self.original, self.config)

    @property
    def reach(self) -> float:
        """Largest share of the given model's MACs that can go."""
        return 1.0 - (self.fixed + self.least) / self.dense_macs

    @property
    def original(self) -> Mapping[str, int]:
        """Units of every group before the first iteration."""
        return {group.name: group.units for group in self.channels.groups}

    def next_limit(self, macs: int) -> int | None:
        """`limit`, or with `target_steps` the first of the steps to it that layers of so many MACs do not meet."""
        share, steps = self.config.target, self.config.target_steps
        if share is None or steps is None:
            return self.limit
        limits = [self._limit((1.0 - share) ** (step / steps)) for step in range(1, steps + 1)]
        return next((limit for limit in limits if limit < macs), limits[-1])

    def reached(self, macs: int) -> bool:
        """Whether there is a target and layers of so many MACs meet it."""
        return self.limit is not None and macs <= self.limit

    def check(self, streams: Callable[[], MacTarget]) -> None:
        """Before anything is trained.

        Args:
            streams: gives the same target with `prune_residual`; asked where this one is out of reach.

        Raises:
            StageError: the target is out of reach.
        """
        if self.limit is None or self.least <= self.limit:
            return
        config = self.config
        raise StageError(
            f"class_aware_pruning: target_mac_reduction {config.target_mac_reduction} cannot be reached: with "
            f"min_width {config.min_width} and round_to {config.round_to} at most {self.reach:.3f} of the MACs go: "
            f"lower these or the target{self.with_streams(streams, ', or set ')}"
        )

    def with_streams(self, streams: Callable[[], MacTarget], before: str) -> str:
        """What `prune_residual` would change, as the end of a sentence; nothing where it is set, or would not matter.

        Args:
            streams: see `check`.
            before: what stands in front of it.
        """
        share = self.config.target
        if self.config.prune_residual or share is None:
            return ""
        reach = streams().reach
        if reach < self.reach + 0.005:
            return ""
        enough = "which alone reaches it" if reach >= share else "which does not reach it either"
        return f"{before}`prune_residual: true`, {enough}: with the streams of residual blocks {reach:.3f} can go"

    def _limit(self, share: float) -> int:
        return int(share * self.dense_macs) - self.fixed
