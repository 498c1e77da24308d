"""One class for each row, with and without exits: the kinds ``classes`` and ``exits``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import EXIT_INDEX, LABEL, SCORES, AnswerSpec, TensorSpec
from ..process.plain_text import printable
from .kind import (
    EXCLUDED_DIFFERS,
    EXIT_DIFFERS,
    LABEL_DIFFERS,
    ArgMax,
    Difference,
    Kind,
    Meaning,
    Outputs,
    blanked,
    is_finite,
    json_numbers,
    label_name,
    mismatch,
    with_overflown,
)

CLASSES, EXITS = "classes", "exits"


class Prediction(NamedTuple):
    """What a classifier said about N rows; of the kinds ``classes`` and ``exits``.

    Attributes:
        label: int64 [N]; -1 for a row that was refused.
        scores: float32 [N, C], see `score_kinds` for what they are; NaN for a row that was refused.
        exit_index: int64 [N], 0 for a model without exits; -1 for a row that was refused.
        labels: the C names, empty if the manifest has none.
        exits: name of every exit, in the order of `exit_index`; empty if there is no manifest.
        excludes: whether the exits rule classes out, whose scores are then exactly 0.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    label: NDArray[np.int64]
    scores: NDArray[np.float32]
    exit_index: NDArray[np.int64]
    labels: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    excludes: bool = False
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def label_names(self) -> list[str]:
        """Name of every label; the number as text where the manifest has no name, ``refused`` for -1."""
        return [label_name(i, self.labels) for i in self.label.ravel().tolist()]

    @property
    def score_kinds(self) -> list[str]:
        """What the scores of every row are.

        - ``probability``: a softmax over all classes.
        - ``probability_of_remaining``: a softmax over the classes that no exit has excluded.
        - ``exclusion``: the row left early because every other class was excluded. The survivor has 1 as a mark of
          that; it is no probability.
        - ``none``: the row was refused.
        """
        last = len(self.exits) - 1
        kinds = []
        for row, exit_index in enumerate(self.exit_index.reshape(len(self.exit_index), -1)[:, 0].tolist()):
            if row in self.refused:
                kinds.append("none")
            elif not self.excludes or bool((self.scores[row] > 0).all()):
                kinds.append("probability")
            else:
                alone = exit_index < last and int((self.scores[row] > 0).sum()) == 1
                kinds.append("exclusion" if alone else "probability_of_remaining")
        return kinds

    @property
    def rows(self) -> int:
        """N."""
        return len(self.label)

    def text(self, row: int) -> str:
        """Label, score and exit."""
        if self.label.ndim != 1:
            return f"labels {self.label[row].tolist()}"
        kind = self.score_kinds[row]
        index, scores = int(self.exit_index[row]), self.scores[row]
        name = printable(self.label_names[row])
        exit_name = f" ({printable(self.exits[index])})" if len(self.exits) > 1 else ""
        if kind == "exclusion":
            return f"{name}  decided by exclusion of every other class, no probability  exit {index}{exit_name}"
        remaining = f" among the {int((scores > 0).sum())} classes not excluded" if kind != "probability" else ""
        return f"{name}  score {float(scores[self.label[row]]):.4f}{remaining}  exit {index}{exit_name}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        exits = self.exits
        return {
            "label": self.label.tolist(),
            "label_names": self.label_names,
            "scores": json_numbers(self.scores),
            "score_kinds": self.score_kinds,
            "exit_index": self.exit_index.tolist(),
            "exit_names": [exits[i] if 0 <= i < len(exits) else None for i in self.exit_index.ravel().tolist()],
        }


class Classes(ArgMax):
    """One class for each row: logits [N, C]."""

    name = CLASSES
    form = "logits [N, C]"

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Prediction:
        """Label and probabilities."""
        scores = softmax(outputs[spec.name])
        label = np.asarray(scores.argmax(axis=-1), np.int64)
        return _prediction(spec, label, scores, np.zeros(label.shape, np.int64), refused, meaning)


class Exits(Kind):
    """One class for each row, from the exit that it took: label [N], scores [N, C], exit_index [N]."""

    name = EXITS
    decides = True
    numbers_follow = True

    def outputs(self, spec: AnswerSpec) -> tuple[str, ...]:
        """Three."""
        del spec
        return LABEL, SCORES, EXIT_INDEX

    def numbers(self, spec: AnswerSpec) -> tuple[str, ...]:
        """The scores."""
        del spec
        return (SCORES,)

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """Label and exit."""
        del spec
        return {LABEL_DIFFERS: outputs[LABEL], EXIT_DIFFERS: outputs[EXIT_INDEX]}

    def differences(
        self, spec: AnswerSpec, got: Outputs, want: Outputs, margin: NDArray[Any] | None, flip_margin: float
    ) -> list[Difference]:
        """Also rows in which only the set of excluded classes differs, if they are excused: else the scores tell."""
        found = super().differences(spec, got, want, margin, flip_margin)
        if margin is None or got[SCORES].ndim != 2:
            return found
        apart = {difference.row for difference in found}
        close = np.asarray(margin).ravel()
        for row in np.flatnonzero(exclusion_differs(got[SCORES], want[SCORES])).tolist():
            if row not in apart and row < close.size and close[row] <= flip_margin:
                found.append(Difference(EXCLUDED_DIFFERS, row, -1, -1, float(close[row]), True))
        return found

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Prediction:
        """Label, scores and exit."""
        return _prediction(spec, outputs[LABEL], outputs[SCORES], outputs[EXIT_INDEX], refused, meaning)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """As many names as there are no classes."""
        return mismatch(spec, tensors[SCORES], -1)


def exits_answer(labels: Sequence[str]) -> AnswerSpec:
    """The answer of a network with exits."""
    return AnswerSpec(LABEL, EXITS, tuple(labels))


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities along the last axis, float32; NaN stays NaN."""
    # the ufuncs themselves: for a row of classes numpy's methods take longer than the arithmetic
    values = logits.astype(np.float32, copy=False)
    exponentials = np.exp(values - np.maximum.reduce(values, axis=-1, keepdims=True))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return np.asarray(exponentials, np.float32)


def exclusion_differs(got: NDArray[Any], want: NDArray[Any]) -> NDArray[np.bool_]:
    """Rows in which another set of classes is excluded, which is where a score is exactly 0.

    Rows with NaN or infinity on either side are not among them: no excluded class explains those.

    Args:
        got: scores, float [N, C].
        want: scores, float [N, C].

    Returns:
        bool [N].
    """
    finite = np.isfinite(got).all(axis=1) & np.isfinite(want).all(axis=1)
    differs: NDArray[np.bool_] = ((got == 0) != (want == 0)).any(axis=1) & finite
    return differs


def _prediction(
    spec: AnswerSpec,
    label: NDArray[np.int64],
    scores: NDArray[np.float32],
    exit_index: NDArray[np.int64],
    refused: dict[int, str],
    meaning: Meaning,
) -> Prediction:
    if refused or not is_finite(scores):
        refused = with_overflown(scores, refused, meaning)
        label, exit_index = blanked(label, refused, -1), blanked(exit_index, refused, -1)
        scores = blanked(scores, refused, np.nan)
    return Prediction(label, scores, exit_index, spec.labels, meaning.exits, meaning.excludes, refused)
