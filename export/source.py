"""What the export asks of a task; `edgewright.pipeline.task.Task` has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from edgewright.edge_runtime.manifest import Preprocessing


class SourceBatch(Protocol):
    """Some rows."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The model's inputs, batch first."""
        ...

    @property
    def targets(self) -> Tensor:
        """int64 [N]."""
        ...


class SourceSplit(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> SourceBatch:
        """The rows at `indices`."""
        ...


class Source(Protocol):
    """Names, axes, labels and real inputs."""

    @property
    def name(self) -> str:
        """A short name."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        ...

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """Per input: axis -> name."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input."""
        ...

    @property
    def splits(self) -> Mapping[Any, SourceSplit]:
        """Splits by name; `test` is used for parity, else whatever there is."""
        ...
