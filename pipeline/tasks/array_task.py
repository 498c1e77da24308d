"""What tasks on arrays have in common, whatever is predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import Metric
from ..task import SPLITS, Batch, Split, SplitName
from .splitting import stratified_split

Array: TypeAlias = Tensor | NDArray[Any]
Augmentation: TypeAlias = Callable[[Batch, torch.Generator], Batch]


class ArraySplit:
    """A split that lies in memory, with targets of any shape.

    Args:
        inputs: per model input, float32 or integer [len, ...].
        targets: float32 or integer [len, ...].

    Raises:
        DataError: lengths differ, a dtype that models do not run in, or a value is NaN or infinite.
    """

    def __init__(self, inputs: Sequence[Array], targets: Array) -> None:
        self._inputs = tuple(torch.as_tensor(x) for x in inputs)
        self._targets = torch.as_tensor(targets)
        named = [*((f"input {i}", x) for i, x in enumerate(self._inputs)), ("the targets", self._targets)]
        for name, x in named:
            if x.dim() == 0 or len(x) != len(self._targets):
                raise DataError(f"{name} are {list(x.shape)} and there are {len(self._targets)} targets")
            if x.dtype in (torch.float64, torch.float16, torch.bfloat16):
                raise DataError(f"{name}: {x.dtype}; models run in float32: convert, e.g. with .astype('float32')")
            bad = ~torch.isfinite(x.reshape(len(x), -1)).all(dim=1) if len(x) else torch.zeros(0, dtype=torch.bool)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise DataError(f"sample {row} of {name} holds NaN or infinity ({int(bad.sum())} such samples)")

    @property
    def targets(self) -> Tensor:
        """What is predicted, [len, ...]."""
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's inputs."""
        arrays = [np.ascontiguousarray(x.numpy()) for x in self._inputs]
        return [
            hashlib.blake2b(b"".join(a[i].tobytes() for a in arrays), digest_size=16).digest() for i in range(len(self))
        ]

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        chosen = torch.as_tensor(indices)
        return Batch(tuple(x[chosen] for x in self._inputs), self._targets[chosen])


class ArrayTask:
    """Base of tasks whose rows have no class: names, axes, splits. A subclass adds loss, metric and answers.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        *,
        preprocessing: Preprocessing | None,
        augment: Augmentation | None,
        name: str,
        input_name: str | Sequence[str],
        provenance: Mapping[str, Any] | None,
        file_digests: Mapping[Path, str] | None,
    ) -> None:
        self._splits: dict[SplitName, Split] = {}
        for key, value in splits.items():
            if key not in SPLITS:
                raise DataError(f"unknown split {key!r}; there are {', '.join(SPLITS)}")
            made = value
            if isinstance(value, tuple):
                inputs = value[0] if isinstance(value[0], list | tuple) else [value[0]]
                made = ArraySplit(inputs, value[1])
            assert not isinstance(made, tuple)
            if len(made) == 0:
                raise DataError(f"split {key!r} is empty: leave it out or add samples")
            self._splits[key] = made
        self._preprocessing = preprocessing or Preprocessing()
        self._augment, self._name = augment, name
        self._input_names = (input_name,) if isinstance(input_name, str) else tuple(input_name)
        self._provenance, self._file_digests = dict(provenance or {}), dict(file_digests or {})

    @property
    def name(self) -> str:
        """A short name for reports."""
        return self._name

    @property
    def labels(self) -> tuple[str, ...]:
        """None: no row as a whole has a class."""
        return ()

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """What the model answers."""
        raise NotImplementedError

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        raise NotImplementedError

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order of the model's forward."""
        return self._input_names

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """The batch may vary, in every input."""
        return tuple({0: "batch"} for _ in self._input_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        return self._preprocessing

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the data come from."""
        return self._provenance

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """Files that the data were read from."""
        return self._file_digests

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        return self._splits

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Applies the augmentation that was given, if any."""
        return batch if self._augment is None else self._augment(batch, generator)


def dealt(
    inputs: Array | Sequence[Array], targets: Tensor, fractions: Mapping[SplitName, float] | None, seed: int
) -> dict[SplitName, Split]:
    """Arrays dealt out to the splits by a hash of their content, equal samples together; see `stratified_split`.

    Raises:
        DataError: see `ArraySplit`; or a share that is not positive.
    """
    xs = [torch.as_tensor(x) for x in (inputs if isinstance(inputs, list | tuple) else [inputs])]
    whole = ArraySplit(xs, targets)
    none = torch.zeros(len(targets), dtype=torch.int64)
    rows = stratified_split(whole.sample_digests, none, ("all",), fractions, seed)
    return {name: ArraySplit([x[chosen] for x in xs], targets[chosen]) for name, chosen in rows.items()}
