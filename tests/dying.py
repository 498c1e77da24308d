"""A context that stands for a kill."""

from __future__ import annotations

from pathlib import Path

from edgewright.pipeline.stage import State
from edgewright.pipeline.store.context import FolderContext


class Dying(FolderContext):
    """Dies right after it has saved for the n-th time."""

    def __init__(self, folder: Path, saves: int) -> None:
        super().__init__(folder)
        self.left = saves

    def save(self, name: str, state: State) -> None:
        super().save(name, state)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
