"""A vector for each row: the kind ``embedding``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, TensorSpec
from .kind import Difference, Kind, Meaning, Outputs, blanked, json_numbers, with_overflown

EMBEDDING, DIRECTION_DIFFERS = "embedding", "direction"

SMALLEST_COSINE = 0.9
"""Vectors of the same row that are further apart than this point elsewhere, whatever the numeric tolerance allows."""

_SHOWN = 4


class Vectors(NamedTuple):
    """A vector for each row; of the kind ``embedding``.

    Attributes:
        vector: float [N, D], as the model gives it, of any length; NaN for a row that was refused.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    vector: NDArray[np.floating]
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.vector)

    def cosines(self) -> NDArray[np.float64]:
        """Between every two rows, [N, N]; NaN for rows that were refused."""
        unit = self.vector / np.linalg.norm(self.vector.astype(np.float64), axis=1, keepdims=True)
        return np.asarray(unit @ unit.T, np.float64)

    def text(self, row: int) -> str:
        """The first numbers, how many there are, and the length of the vector."""
        vector = self.vector[row]
        more = " ..." if len(vector) > _SHOWN else ""
        numbers = " ".join(f"{number:.6g}" for number in vector[:_SHOWN].tolist())
        return f"{numbers}{more} [{len(vector)}], norm {float(np.linalg.norm(vector.astype(np.float64))):.6g}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"vector": json_numbers(self.vector)}


class EmbeddingKind(Kind):
    """A vector [N, D] that is compared with others by its direction; nothing is decided."""

    name = EMBEDDING

    def differences(
        self, spec: AnswerSpec, got: Outputs, want: Outputs, margin: NDArray[Any] | None, flip_margin: float
    ) -> list[Difference]:
        """Rows whose two vectors have a cosine below `SMALLEST_COSINE`."""
        del margin, flip_margin
        apart = 1.0 - cosines(got[spec.name], want[spec.name])
        # vectors that are not finite are found as numbers
        rows = np.flatnonzero(apart > 1.0 - SMALLEST_COSINE).tolist()
        return [Difference(DIRECTION_DIFFERS, row, -1, -1, None, False, said=_said(1.0 - apart[row])) for row in rows]

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Vectors:
        """The vectors."""
        vector = outputs[spec.name]
        refused = with_overflown(vector, refused, meaning)
        return Vectors(blanked(vector, refused, np.nan), refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """Not [N, D]."""
        tensor = tensors[spec.name]
        if len(tensor.shape) != 2:
            return (
                f"the output {spec.name!r} has the shape {list(tensor.shape)}, and {self.name} is one vector a row, "
                "[N, D]: pool over the other axes in the model"
            )
        return super().unfit(spec, tensors)


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Of each row of `a` with the same row of `b`, both [N, D]; 1 for two of zeros, 0 for one, NaN if not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = (x * y).sum(axis=1) / (lengths[0] * lengths[1])
    none = (lengths[0] == 0) | (lengths[1] == 0)
    return np.where(none, np.where((lengths[0] == 0) & (lengths[1] == 0), 1.0, 0.0), found)


def _said(cosine: float) -> str:
    return f"the vectors have a cosine of {cosine:.4g}, and less than {SMALLEST_COSINE:g} is another direction"
