"""Trials of policies that remember nothing from exit to exit: a row leaves at the first exit that finds it sure enough.

What an exit says of a row then depends on its own threshold alone. So the rows that would leave at an exit are one set
per threshold, worked out once by the policy's own `decide`, and a trial takes such sets from the rows still inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.models.layers.exit_policies import ExitPolicy

from .counts import Counts

Rows = NDArray[np.bool_]

_REMEMBERED_BYTES = 64 << 20  # of sets of rows
_ELEMENTS_PER_DECISION = 1 << 20  # of [rows, classes], and of [thresholds, rows]
_ELEMENTS_PER_CHUNK = 1 << 20  # of [trials, rows], small enough to stay in a cache


class ConfidenceTrials:
    """Outcomes of many settings of the thresholds on cached logits, for a policy that does not exclude.

    Args:
        policy: without memory (`ExitPolicy.excludes` is False).
        logits: K + 1 tensors float [N, C].
        targets: int64 [N].
        at_the_end: bool [N], right where no row leaves early.
    """

    def __init__(self, policy: ExitPolicy, logits: Sequence[Tensor], targets: Tensor, at_the_end: Tensor) -> None:
        self.policy, self.logits = policy, logits
        self.exits = len(logits) - 1
        self.rows, self.classes = logits[0].shape
        self._chunk = max(1, _ELEMENTS_PER_DECISION // self.classes)
        # rows in the order of their classes, so that the right ones of a class are the sum of a stretch
        self._order = torch.argsort(targets, stable=True)
        ordered: NDArray[np.int64] = targets[self._order].cpu().numpy()
        self.present, self._starts = np.unique(ordered, return_index=True)
        self.right = [self._answers(i) == ordered for i in range(self.exits)]
        self.right.append(at_the_end[self._order].cpu().numpy())
        self._sets: OrderedDict[tuple[int, float], Rows] = OrderedDict()
        self._remember = max(1, _REMEMBERED_BYTES // max(1, self.rows))

    def sweep(self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]) -> Counts:
        """Tries `values` as the threshold of one exit while the others stay; no class is excluded anywhere."""
        size = max(1, _ELEMENTS_PER_CHUNK // self.rows)
        parts = [self._sweep(thresholds, exit_index, values[k : k + size]) for k in range(0, len(values), size)]
        hits, leaving, flips = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Counts(hits, leaving, np.zeros(len(values), np.int64), flips)

    def _sweep(
        self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        inside = np.ones((1, self.rows), np.bool_)
        right = np.zeros((1, self.rows), np.bool_)
        leaving = np.zeros((len(values), self.exits + 1), np.int64)
        for i in range(self.exits):
            leaves = inside & self._sure(i, values if i == exit_index else thresholds[i : i + 1])
            right = right | (leaves & self.right[i])
            leaving[:, i] = np.count_nonzero(leaves, axis=1)
            inside = inside & ~leaves
        leaving[:, -1] = np.count_nonzero(inside, axis=1)
        right |= inside & self.right[-1]
        hits = np.zeros((len(values), self.classes), np.int64)
        hits[:, self.present] = np.add.reduceat(right.view(np.uint8), self._starts, axis=1, dtype=np.int64)
        return hits, leaving, np.count_nonzero(right != self.right[-1], axis=1)

    def _answers(self, exit_index: int) -> NDArray[np.int64]:
        """What each row's label would be there, int64 [N], in order; it does not depend on the threshold."""
        parts = []
        for rows in torch.split(self._order, self._chunk):
            logits = self.logits[exit_index][rows]
            scores = self.policy.decide(logits, torch.tensor(self.policy.never, device=logits.device), None).scores
            parts.append(scores.argmax(dim=1).cpu())
        answers: NDArray[np.int64] = torch.cat(parts).numpy()
        return answers

    def _sure(self, exit_index: int, values: Sequence[float]) -> Rows:
        """Who would leave at an exit with each of `values` as its threshold, bool [T, N], in order."""
        new = sorted({value for value in values if (exit_index, value) not in self._sets})
        if new:
            found = self._decided(exit_index, new)
            self._sets.update({(exit_index, value): row for value, row in zip(new, found, strict=True)})
        answer = np.stack([self._sets[exit_index, value] for value in values])
        for value in values:
            self._sets.move_to_end((exit_index, value))
        while len(self._sets) > self._remember:
            self._sets.popitem(last=False)
        return answer

    def _decided(self, exit_index: int, values: Sequence[float]) -> Rows:
        tried = torch.tensor(values, dtype=torch.float32, device=self.logits[exit_index].device)
        parts = []
        size = max(1, min(self._chunk, _ELEMENTS_PER_DECISION // len(values)))
        for rows in torch.split(self._order, size):
            logits = self.logits[exit_index][rows]

            def decided(value: Tensor, logits: Tensor = logits) -> Tensor:
                return self.policy.decide(logits, value, None).decided

            parts.append(torch.vmap(decided)(tried).cpu())
        rows_of_values: Rows = torch.cat(parts, dim=1).numpy()
        return rows_of_values
