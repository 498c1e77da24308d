"""How vectors are judged: by their neighbours, by scores of pairs, or by the vectors that they should be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import DataError
from ..metric import Answer, Metric, Score

RECALL, SPEARMAN, COSINE = "recall@", "spearman", "cosine"
"""Names of the metrics; the first is followed by a number."""
_QUERIES = 256
"""Rows whose neighbours are looked for at once."""


class Recall:
    """Share of rows with one of their group among the `k` nearest other rows; rows that stand alone do not count.

    Args:
        k: neighbours that are looked at.
    """

    def __init__(self, k: int) -> None:
        self.name, self._k = f"{RECALL}{k}", k

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; keeps the vectors."""
        vectors, groups = _read(answers)
        unit = nn.functional.normalize(vectors.double(), dim=1)
        hits = []
        for rows in torch.split(torch.arange(len(unit)), _QUERIES):
            cosine = unit[rows] @ unit.T
            cosine[torch.arange(len(rows)), rows] = -math.inf
            nearest = cosine.topk(min(self._k, max(1, len(unit) - 1)), dim=1).indices
            hits.append((groups[nearest] == groups[rows][:, None]).any(dim=1))
        _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        right = torch.cat(hits)[counts[inverse] > 1].numpy()
        return Score(float(right.mean()) if len(right) else 0.0, len(right), each=right, right=right)

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


class RankCorrelation:
    """Spearman's correlation of the cosine of each pair with its score, by `torchmetrics`."""

    name = SPEARMAN

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; `Score.each` is [pairs, 2], cosine and score."""
        vectors, targets = _read(answers)
        first: dict[float, int] = {}
        pairs = []
        for row, number in enumerate(targets[:, 0].tolist()):
            if number in first:
                pairs.append((first.pop(number), row))
            else:
                first[number] = row
        a, b = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        cosine = nn.functional.cosine_similarity(vectors[a].double(), vectors[b].double(), dim=1)
        each = torch.stack([cosine, targets[b, 1].double()], dim=1).numpy()
        value = self.value_of(each)
        return Score(0.0 if math.isnan(value) else value, len(each), each=each)

    def value_of(self, each: NDArray[Any]) -> float:
        """Of some pairs; NaN where cosines or scores are all equal."""
        from torchmetrics.functional.regression import spearman_corrcoef

        if len(each) < 2 or not np.isfinite(each).all() or (np.ptp(each, axis=0) == 0).any():
            return math.nan
        cosine, score = torch.from_numpy(each).T
        return float(spearman_corrcoef(cosine.contiguous(), score.contiguous()))

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


class MeanCosine:
    """Mean cosine of each vector with the one that it should be."""

    name = COSINE

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once."""
        parts = [torch.zeros(0, dtype=torch.float64)]
        for output, targets in answers:
            assert isinstance(output, Tensor)
            check_vectors(output, targets)
            parts.append(nn.functional.cosine_similarity(output.double(), targets.double(), dim=1))
        each = torch.cat(parts).numpy()
        return Score(float(each.mean()) if len(each) else 0.0, len(each), each=each)

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


def metric_of(name: str | None, form: str) -> Metric:
    """The metric called `name`, default the one of targets of this form.

    Raises:
        DataError: it is none of theirs.
    """
    if form == COSINE and name in (None, COSINE):
        return MeanCosine()
    if form == SPEARMAN and name in (None, SPEARMAN):
        return RankCorrelation()
    number = (name or f"{RECALL}1").removeprefix(RECALL)
    if form == RECALL and number.isdecimal() and int(number) > 0 and name in (None, f"{RECALL}{number}"):
        return Recall(int(number))
    wanted = "recall@K with a whole number K" if form == RECALL else form
    raise DataError(
        f"the metric {name!r} is none of targets of this form: give {wanted}, or an object that is a Metric"
    )


def _read(answers: Iterable[Answer]) -> tuple[Tensor, Tensor]:
    vectors, targets = [], []
    for output, wanted in answers:
        assert isinstance(output, Tensor)
        check_vectors(output, None)
        vectors.append(output)
        targets.append(wanted)
    return torch.cat(vectors), torch.cat(targets)


def check_vectors(output: Any, targets: Tensor | None) -> None:
    """Refuses what is no vector for each row, or another one than `targets` if they are vectors.

    Raises:
        DataError: gives the shape.
    """
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"the model returns {shape}, and an embedding is one vector a row, [N, D]: pool in the model")
    if targets is not None and output.shape != targets.shape:
        raise DataError(f"the model returns {list(output.shape)} and the vectors to learn are {list(targets.shape)}")
