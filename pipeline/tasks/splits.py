"""Splits from what users have: tensors in memory, and map-style datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..task import Batch, Split


def class_indices(targets: Tensor | NDArray[Any] | Sequence[int]) -> Tensor:
    """Targets as class indices int64 [len].

    Raises:
        DataError: numbers with fractions (regression), or several numbers per sample (one-hot, many labels).
    """
    given = torch.as_tensor(targets)
    if given.dim() > 1 and given.numel() != len(given):
        raise DataError(
            f"the targets have shape {list(given.shape)}; one class index per sample is needed: turn one-hot targets "
            "into indices with .argmax(axis=1); several labels per sample are not supported"
        )
    flat = given.reshape(-1)
    if flat.is_floating_point():
        fractions = (flat != flat.round()) | ~torch.isfinite(flat)
        if fractions.any():
            row = int(fractions.nonzero()[0])
            raise DataError(
                f"the target of sample {row} is {float(flat[row]):g}, which is no class index: numbers "
                "are predicted by edgewright.pipeline.Regression, a class for each sample by ImageClassification"
            )
    return flat.to(torch.int64)


class TensorSplit:
    """A split that lies in memory."""

    def __init__(self, inputs: Sequence[Tensor | NDArray[Any]], targets: Tensor | NDArray[Any] | Sequence[int]) -> None:
        """Checks and keeps the data.

        Args:
            inputs: per model input, float32 or integer [len, ...].
            targets: class indices [len].

        Raises:
            DataError: lengths differ, targets are no class indices, or a value is NaN or infinite.
        """
        self._inputs = tuple(torch.as_tensor(x) for x in inputs)
        self._targets = class_indices(targets)
        for i, x in enumerate(self._inputs):
            if len(x) != len(self._targets):
                raise DataError(f"input {i} has {len(x)} samples and there are {len(self._targets)} targets")
            if x.dtype == torch.float64:
                raise DataError(
                    f"input {i} is float64; models run in float32: convert it, e.g. with .astype('float32')"
                )
            if x.is_floating_point():
                bad = ~torch.isfinite(x.reshape(len(x), -1)).all(dim=1) if len(x) else torch.zeros(0, dtype=torch.bool)
                if bad.any():
                    row = int(bad.nonzero()[0])
                    raise DataError(f"sample {row} of input {i} holds NaN or infinity ({int(bad.sum())} such samples)")
        if len(self._targets) and int(self._targets.min()) < 0:
            raise DataError(f"sample {int(self._targets.argmin())} has the negative class {int(self._targets.min())}")

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
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


class DatasetSplit:
    """A split read sample by sample from a map-style dataset of ``(input, ..., class)``."""

    def __init__(self, dataset: Dataset[Any], targets: Sequence[int] | None = None) -> None:
        """Wraps `dataset`.

        Args:
            dataset: any object with ``__len__`` and ``__getitem__``.
            targets: its classes, if known without reading every sample.
        """
        self._dataset: Any = dataset
        self._digests: list[bytes] | None = None
        self._targets = None if targets is None else class_indices(targets)

    def _read(self, index: int) -> tuple[tuple[Tensor, ...], int]:
        try:
            *inputs, target = self._dataset[index]
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"sample {index} cannot be read: {error}; repair or remove it") from error
        tensors = tuple(torch.as_tensor(x) for x in inputs)
        for x in tensors:
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise DataError(f"sample {index} holds NaN or infinity; repair or remove it")
        return tensors, int(class_indices(target))

    def _scan(self) -> None:
        digests, targets = [], []
        for i in range(len(self)):
            inputs, target = self._read(i)
            content = b"".join(np.ascontiguousarray(x.numpy()).tobytes() for x in inputs)
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
            targets.append(target)
        self._digests, self._targets = digests, torch.tensor(targets, dtype=torch.int64)

    @property
    def targets(self) -> Tensor:
        """Class of every sample, int64 [len]."""
        if self._targets is None:
            self._scan()
        assert self._targets is not None
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every sample's inputs; reads the whole split once."""
        if self._digests is None:
            self._scan()
        assert self._digests is not None
        return self._digests

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`."""
        rows = [self._read(int(i)) for i in torch.as_tensor(indices).tolist()]
        if not rows:
            raise DataError("a batch needs at least one sample")
        inputs = tuple(torch.stack(column) for column in zip(*(r[0] for r in rows), strict=True))
        return Batch(inputs, torch.tensor([r[1] for r in rows], dtype=torch.int64))


def as_split(value: Any) -> Split:
    """A `Split` from one, from a pair ``(inputs, targets)`` of arrays, or from a map-style dataset of pairs.

    Raises:
        DataError: it is none of them.
    """
    if hasattr(value, "batch") and hasattr(value, "sample_digests"):
        split: Split = value
        return split
    if isinstance(value, tuple) and len(value) == 2:
        return TensorSplit([value[0]], value[1])
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return DatasetSplit(value, targets=getattr(value, "targets", None))
    raise DataError(f"a split is a pair (inputs, targets), a dataset or a Split, not {type(value).__name__}")
