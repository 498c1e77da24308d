"""Numbers that decide nothing: the kind ``values``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, TensorSpec
from ..process.plain_text import printable
from .kind import Kind, Meaning, Outputs, blanked, json_numbers, mismatch, with_overflown

VALUES = "values"

_SHOWN = 8


class Values(NamedTuple):
    """Numbers in the unit of the data; of the kind ``values``.

    Attributes:
        values: float [N, ...]; NaN for a row that was refused.
        unit: of the numbers, empty where none is known.
        labels: name of every column (axis 1), empty where there are none.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    values: NDArray[np.floating]
    unit: str = ""
    labels: tuple[str, ...] = ()
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.values)

    def text(self, row: int) -> str:
        """The first numbers, with the names of the columns where there are any."""
        values = self.values[row]
        numbers = np.asarray(values).ravel()
        names = self.labels if len(self.labels) == numbers.size else ("",) * numbers.size
        pairs = zip(names, numbers[:_SHOWN].tolist(), strict=False)
        shown = " ".join(f"{printable(name)} {number:.6g}" if name else f"{number:.6g}" for name, number in pairs)
        unit = f" {printable(self.unit)}" if self.unit else ""
        more = f" ... {list(np.shape(values))}" if numbers.size > _SHOWN else ""
        return f"{shown}{unit}{more}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"values": json_numbers(self.values), "unit": self.unit, "labels": list(self.labels)}


class ValuesKind(Kind):
    """Numbers: any float tensor [N, ...]."""

    name = VALUES

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Values:
        """The numbers in the unit of the data."""
        values = outputs[spec.name]
        for numbers, apply in ((spec.scale, np.multiply), (spec.offset, np.add)):
            if numbers:
                values = apply(values, _by_column(numbers, values)).astype(values.dtype)
        refused = with_overflown(values, refused, meaning)
        return Values(blanked(values, refused, np.nan), spec.unit, spec.labels, refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """A number of factors or names that is not that of the columns; factors that lose the values."""
        tensor = tensors[spec.name]
        for field, numbers in (("scale", spec.scale), ("offset", spec.offset)):
            columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
            if len(numbers) > 1 and isinstance(columns, int) and len(numbers) != columns:
                return f"{field} has {len(numbers)} numbers for the {columns} columns of {spec.name!r}"
            if not np.isfinite(numbers).all() or (field == "scale" and 0 in numbers):
                return f"{field} of {spec.name!r} is {list(numbers)}, which no value comes back from"
        return (mismatch(spec, tensor, 1) if len(tensor.shape) > 1 else None) or super().unfit(spec, tensors)


def _by_column(numbers: Sequence[float], values: NDArray[Any]) -> NDArray[np.float64]:
    column = np.asarray(numbers, np.float64)
    return column.reshape(1, -1, *(1,) * (values.ndim - 2)) if values.ndim > 1 else column
