"""Any number of classes for each row: the kind ``multilabel``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, TensorSpec
from ..process.plain_text import printable
from .kind import LABEL_DIFFERS, Kind, Meaning, Outputs, blanked, json_numbers, label_name, mismatch, with_overflown

MULTILABEL = "multilabel"

_EVEN = 0.5


class Labels(NamedTuple):
    """Which classes each row shows; of the kind ``multilabel``.

    Attributes:
        present: bool [N, C]; no class of a row that was refused.
        probability: float32 [N, C], of each class by itself; NaN for a row that was refused.
        labels: names of the classes, empty if the manifest has none.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    present: NDArray[np.bool_]
    probability: NDArray[np.float32]
    labels: tuple[str, ...] = ()
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.present)

    def names(self, row: int) -> list[str]:
        """Of the classes that the row shows, the likeliest first."""
        shown = np.flatnonzero(self.present[row])
        order = shown[np.argsort(-self.probability[row][shown], kind="stable")]
        return [label_name(int(index), self.labels) for index in order]

    def text(self, row: int) -> str:
        """The classes with their probabilities; where there is none, the one that came nearest."""
        probability = self.probability[row]
        shown = np.flatnonzero(self.present[row])
        order = shown[np.argsort(-probability[shown], kind="stable")].tolist()
        if order:
            return "  ".join(f"{printable(label_name(i, self.labels))} {float(probability[i]):.4f}" for i in order)
        best = int(probability.argmax())
        return f"none  (nearest {printable(label_name(best, self.labels))} {float(probability[best]):.4f})"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "present": [self.names(row) for row in range(self.rows)],
            "probability": json_numbers(self.probability),
            "labels": list(self.labels),
        }


class MultilabelKind(Kind):
    """A logit for each class [N, C], each decided by itself: a class counts from its threshold on."""

    name = MULTILABEL
    decides = True
    class_axis = -1

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """1 where a row shows the class, int64 [N, C]."""
        logits = outputs[spec.name]
        return {LABEL_DIFFERS: np.asarray(logits >= _logits_of(spec, logits.shape[-1]), np.int64)}

    def margins(self, spec: AnswerSpec, outputs: Outputs) -> NDArray[np.float32] | None:
        """How far each logit is from its threshold."""
        logits = outputs[spec.name].astype(np.float64)
        return np.asarray(np.abs(logits - _logits_of(spec, logits.shape[-1])), np.float32)

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Labels:
        """Classes and their probabilities."""
        logits = outputs[spec.name].astype(np.float32, copy=False)
        refused = with_overflown(logits, refused, meaning)
        present = logits >= _logits_of(spec, logits.shape[-1])
        with np.errstate(over="ignore"):
            probability = np.asarray(1.0 / (1.0 + np.exp(-logits)), np.float32)
        return Labels(blanked(present, refused, 0), blanked(probability, refused, np.nan), spec.labels, refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """Not [N, C], as many names or thresholds as there are no classes, or a threshold that is no probability."""
        tensor = tensors[spec.name]
        if len(tensor.shape) != 2:
            return f"the output {spec.name!r} has the shape {list(tensor.shape)}, and {self.name} are logits [N, C]"
        classes = tensor.shape[1]
        if len(spec.thresholds) > 1 and isinstance(classes, int) and len(spec.thresholds) != classes:
            return f"{spec.name!r} has {len(spec.thresholds)} thresholds for {classes} classes"
        if any(not 0.0 < value < 1.0 for value in spec.thresholds):
            return f"the thresholds of {spec.name!r} are {list(spec.thresholds)}: probabilities lie between 0 and 1"
        return mismatch(spec, tensor, 1) or super().unfit(spec, tensors)


def _logits_of(spec: AnswerSpec, classes: int) -> NDArray[np.float32]:
    """The thresholds as logits, float32 [C]."""
    values = np.asarray(spec.thresholds or (_EVEN,), np.float64)
    return np.broadcast_to(np.log(values / (1.0 - values)), (classes,)).astype(np.float32)
