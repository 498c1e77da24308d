"""The context that the runner gives to a stage: seeds, progress, saved state."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from ..stage import Progress, State

T = TypeVar("T")


class Quiet:
    """A `Progress` that shows nothing."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yields `items`."""
        del description, total
        yield from items

    def say(self, text: str) -> None:
        """Says nothing."""
        del text


class FolderContext:
    """A `Context` whose state lies in a folder; what `pipeline.run` uses, and good for tests and notebooks.

    Args:
        folder: where state goes; made when needed.
        seed: of every generator.
        device: where to compute.
        progress: default `Quiet`.
        verify: called before state is stored; what it raises keeps the state of before.
    """

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._verify = verify
        self.seed = seed
        self.device = torch.device(device)
        self.progress: Progress = progress or Quiet()

    def generator(self, *name: str | int) -> torch.Generator:
        """A CPU generator whose seed depends on `seed` and `name` only."""
        digest = hashlib.sha256(json.dumps([self.seed, *name]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def save(self, name: str, state: State) -> None:
        """Stores `state` under `name`, replacing what was there; a kill leaves either the old or the new."""
        self._verify()
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._file(name)
        # the JSON travels inside the safetensors header, so that one rename replaces both
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.tensors.items()}
        aside = target.with_suffix(".tmp")
        save_file(tensors, str(aside), metadata={"data": json.dumps(state.data)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(target)

    def load(self, name: str) -> State | None:
        """What was saved last under `name`, or None."""
        target = self._file(name)
        if not target.exists():
            return None
        with target.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return State(json.loads(header["__metadata__"]["data"]), load_file(str(target)))

    def _file(self, name: str) -> Path:
        return self._folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + ".state")
