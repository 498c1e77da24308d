"""What `predict` returns, a type for each kind of answer (see `bundle.answer`)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray


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


class ClassMap(NamedTuple):
    """A class for every pixel; of the kind ``class_map``.

    Attributes:
        label: int64 [N, H, W]; -1 for a row that was refused.
        probability: float32 [N, H, W], of that class; NaN for a row that was refused.
        labels: names of the classes, empty if the manifest has none.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    label: NDArray[np.int64]
    probability: NDArray[np.float32]
    labels: tuple[str, ...] = ()
    refused: Mapping[int, str] = MappingProxyType({})

    def shares(self, row: int) -> dict[str, float]:
        """Name of every class in the map of `row` -> its share of the pixels, the largest first."""
        found, counts = np.unique(self.label[row], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {label_name(int(found[i]), self.labels): float(counts[i]) / self.label[row].size for i in order}


class Tokens(NamedTuple):
    """The token that follows at every position; of the kind ``tokens``.

    Attributes:
        token: int64 [N, T], the likeliest; -1 for a row that was refused.
        logits: float [N, T, V]; NaN for a row that was refused.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    token: NDArray[np.int64]
    logits: NDArray[np.floating]
    refused: Mapping[int, str] = MappingProxyType({})


Result: TypeAlias = Prediction | Values | ClassMap | Tokens
"""One answer for N rows."""


def label_name(index: int, labels: tuple[str, ...]) -> str:
    """Name of a class; its number where there is no name, ``refused`` for -1."""
    if index < 0:
        return "refused"
    return labels[index] if index < len(labels) else str(index)
