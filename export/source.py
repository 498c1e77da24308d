"""What the export asks of a task; `edgewright.pipeline.task.Task` extends it by what training and reports ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgewright.edge_runtime.bundle.manifest import Preprocessing

if TYPE_CHECKING:  # the simplifier's child process reads this package, and torch takes seconds to load
    from torch import Tensor


class SourceBatch(Protocol):
    """Some rows."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The model's inputs in the order it takes them, batch first."""
        ...


class SourceSplit(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> SourceBatch:
        """The rows at `indices`.

        Raises:
            InputError: a row cannot be read or is not finite; names it.
        """
        ...


class Source(Protocol):
    """Names, axes, labels and real inputs."""

    @property
    def name(self) -> str:
        """A short name for reports."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; their number is the number of logits. Empty: no classes, logits may be [N, T, V]."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order; they become the ONNX input names."""
        ...

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """Per input: axis -> name, for the axes that may vary. Axis 0 is ``"batch"``."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        ...

    @property
    def splits(self) -> Mapping[Any, SourceSplit]:
        """Splits by name; `test` is used for parity, else whatever there is."""
        ...
