"""Trials of policies that exclude classes, on sets of classes packed into words of 64 bits.

Where a policy judges every class by itself (`ExitPolicy.classwise`), two sets of classes say all about one row at one
exit with one threshold: the strong ones, which stay if nothing was excluded before, and the favourites, which stay or
come back whatever was excluded. What is left of ``left`` is then ``strong & (left | favourites)``: one operation for 64
classes. Both sets come from the policy's own `decide`, so this is its algebra and no copy of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.models.layers.exit_policies import ExitPolicy

from .counts import Counts

Words = NDArray[np.uint64]

_WORD = 64
_REMEMBERED_BYTES = 512 << 20  # of packed sets
_ELEMENTS_PER_DECISION = 1 << 20  # of [rows, classes]
_WORDS_PER_CHUNK = 1 << 16  # of [trials, rows, classes / 64], small enough to stay in a cache
_CLOSE = 1e-6  # logits nearer than this may round to the same probability
_MOST_STEPS = 255  # numbered in a byte


def pack(classes: Tensor) -> Words:
    """Sets of classes, bool [N, C], as uint64 [ceil(C / 64), N]."""
    octets = np.packbits(classes.cpu().numpy(), axis=1, bitorder="little")
    padded = np.zeros((len(octets), -(-classes.shape[1] // _WORD) * 8), np.uint8)
    padded[:, : octets.shape[1]] = octets
    return np.ascontiguousarray(padded.view(np.uint64).T)


def unpack(words: Words, classes: int) -> Tensor:
    """The inverse of `pack`: bool [N, C]."""
    octets = np.ascontiguousarray(words.T).view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=classes, bitorder="little")).to(torch.bool)


def _one_left(left: Words) -> NDArray[np.bool_]:
    """Bool [...]: the sets [words, ...] that hold exactly one class."""
    several = ((left & (left - np.uint64(1))) != 0).any(axis=0)
    single: NDArray[np.bool_] = (np.count_nonzero(left, axis=0) == 1) & ~several
    return single


class _Outcomes(NamedTuple):
    """What became of rows, [n], or of rows in trials, [T, n]."""

    right: NDArray[np.bool_]
    lost: NDArray[np.bool_]
    """The true class is excluded."""
    exit_of: NDArray[np.int16]

    @classmethod
    def empty(cls, *shape: int) -> _Outcomes:
        return cls(np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.int16))


class ExclusionTrials:
    """Outcomes of many settings of the thresholds on cached logits, for a policy that is `ExitPolicy.classwise`.

    Args:
        policy: excludes, class by class.
        logits: K + 1 tensors float [N, C].
        targets: int64 [N].
        at_the_end: bool [N], right where no row leaves early.
        steps: at most 255 thresholds that will be asked for again and again, from `never` to `always`.
    """

    def __init__(
        self,
        policy: ExitPolicy,
        logits: Sequence[Tensor],
        targets: Tensor,
        at_the_end: Tensor,
        steps: Sequence[float],
    ) -> None:
        assert len(steps) <= _MOST_STEPS
        self.policy, self.logits = policy, logits
        self._steps = torch.tensor(list(steps), dtype=torch.float32, device=logits[0].device)
        self._step_of = {value: step for step, value in enumerate(steps)}
        self._survived: dict[int, NDArray[np.uint8]] = {}
        self.exits = len(logits) - 1
        self.rows, self.classes = logits[0].shape
        self._chunk = max(1, _ELEMENTS_PER_DECISION // self.classes)
        self.targets: NDArray[np.int64] = targets.cpu().numpy()
        self.device_targets = targets
        self.at_the_end: NDArray[np.bool_] = at_the_end.cpu().numpy()
        self.favourites = [self._kept(i, policy.never, memory=True) for i in range(self.exits)]
        self._strong: OrderedDict[tuple[int, float], Words] = OrderedDict()
        self._remember = max(1, _REMEMBERED_BYTES // max(1, self.favourites[0].nbytes))
        own = torch.nn.functional.one_hot(targets.cpu(), self.classes).to(torch.bool)
        self.own = pack(own)
        self.rivals, self.close = self._rivals()

    def sweep(self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]) -> Counts:
        """Tries `values` as the threshold of one exit while the others stay."""
        outcomes = _Outcomes.empty(len(values), self.rows)
        size = max(1, _WORDS_PER_CHUNK // (len(self.own) * len(values)))
        for start in range(0, self.rows, size):
            self._sweep(thresholds, exit_index, values, np.arange(start, min(start + size, self.rows)), outcomes)
        trial, row = outcomes.right.nonzero()
        hits = np.bincount(trial * self.classes + self.targets[row], minlength=len(values) * self.classes)
        leaving = np.stack([np.count_nonzero(outcomes.exit_of == i, axis=1) for i in range(self.exits + 1)], axis=1)
        flips = np.count_nonzero(outcomes.right != self.at_the_end, axis=1)
        return Counts(hits.reshape(len(values), self.classes), leaving, np.count_nonzero(outcomes.lost, axis=1), flips)

    def _sweep(
        self,
        thresholds: Sequence[float],
        exit_index: int,
        values: Sequence[float],
        rows: NDArray[np.int64],
        outcomes: _Outcomes,
    ) -> None:
        """Some rows, neighbours, of a sweep."""
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        left = np.full((len(self.own), len(rows)), np.uint64(2**64 - 1))
        for i in range(exit_index):  # what comes before is the same for all trials
            left = self._strong_at(i, thresholds[i])[:, rows] & (left | self.favourites[i][:, rows])
            leaves = _one_left(left)
            gone = rows[leaves]
            right = (left[:, leaves] & self.own[:, gone]).any(axis=0)
            outcomes.right[:, gone], outcomes.lost[:, gone], outcomes.exit_of[:, gone] = right, ~right, i
            left, rows = left[:, ~leaves], rows[~leaves]
        states = np.stack([self._strong_at(exit_index, value)[:, part] for value in values], axis=1)
        if len(rows) < states.shape[2]:
            states = states[:, :, rows - part.start]
        states &= (left | self.favourites[exit_index][:, rows])[:, None]
        # neighbouring thresholds mostly leave a row the same classes: what follows is computed once for each run
        new = np.ones(states.shape[1:], np.bool_)
        np.any(states[:, 1:] != states[:, :-1], axis=0, out=new[1:])
        trial, row = new.nonzero()
        run_of = np.zeros(new.shape, np.int64)
        run_of[new] = np.arange(len(trial))
        run_of = np.maximum.accumulate(run_of, axis=0)  # numbered trial by trial, so a row's own number only grows
        found = self._follow(thresholds, exit_index, states[:, trial, row], rows[row])
        for whole, some in zip(outcomes, found, strict=True):
            whole[:, rows] = some[run_of]

    def _follow(self, thresholds: Sequence[float], first: int, left: Words, rows: NDArray[np.int64]) -> _Outcomes:
        """From what exit `first` left of some rows, [words, n], to the end; the outcomes are [n]."""
        outcomes = _Outcomes.empty(len(rows))
        alive = np.arange(len(rows))
        for i in range(first, self.exits):
            if i > first:
                here = rows[alive]
                left = self._strong_at(i, thresholds[i])[:, here] & (left | self.favourites[i][:, here])
            leaves = _one_left(left)
            gone = alive[leaves]
            # a row that leaves has one class left: its own, or it is excluded
            right = (left[:, leaves] & self.own[:, rows[gone]]).any(axis=0)
            outcomes.right[gone], outcomes.lost[gone], outcomes.exit_of[gone] = right, ~right, i
            alive, left = alive[~leaves], left[:, ~leaves]
        here = rows[alive]
        own = self.own[:, here]
        outcomes.exit_of[alive] = self.exits
        outcomes.lost[alive] = ~(left & own).any(axis=0)
        right = ((left & (self.rivals[:, here] | own)) == own).all(axis=0)  # no rival is left beside it
        self._settle(right, left, here)
        outcomes.right[alive] = right
        return outcomes

    def _settle(self, right: NDArray[np.bool_], left: Words, rows: NDArray[np.int64]) -> None:
        """Asks the policy itself about rows at the network's end whose logits are too close to compare, in place."""
        at = self.close[rows].nonzero()[0]
        if len(at) == 0:
            return
        excluded = ~unpack(left[:, at], self.classes)
        logits = self.logits[-1][torch.from_numpy(rows[at]).to(self.logits[-1].device)]
        best = self.policy.finish(logits, excluded.to(logits.device)).argmax(dim=1).cpu().numpy()
        right[at] = best == self.targets[rows[at]]

    def _strong_at(self, exit_index: int, threshold: float) -> Words:
        """The strong classes of all rows, remembered: sweeps meet the same thresholds again and again."""
        key = (exit_index, threshold)
        if key not in self._strong:
            step = self._step_of.get(threshold)
            if step is None:
                self._strong[key] = self._kept(exit_index, threshold, memory=False)
            else:
                self._strong[key] = pack(torch.from_numpy(self._steps_survived(exit_index) > step))
            if len(self._strong) > self._remember:
                self._strong.popitem(last=False)
        self._strong.move_to_end(key)
        return self._strong[key]

    def _steps_survived(self, exit_index: int) -> NDArray[np.uint8]:
        """How many of `steps` every class of every row survives, uint8 [N, C], by halving.

        A class that one threshold excludes is excluded by all behind it, so a few decisions with a threshold for every
        class say what a decision for every step would.
        """
        if exit_index not in self._survived:
            parts = []
            for logits in torch.split(self.logits[exit_index], self._chunk):
                survived = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
                for bit in reversed(range(len(self._steps).bit_length())):
                    tried = survived + 2**bit
                    known = tried <= len(self._steps)
                    beta = self._steps[(tried - 1).clamp_max(len(self._steps) - 1)]
                    excluded = self.policy.decide(logits, beta, None).excluded
                    assert excluded is not None
                    survived = torch.where(known & ~excluded, tried, survived)
                parts.append(survived.to(torch.uint8).cpu())
            self._survived[exit_index] = torch.cat(parts).numpy()
        return self._survived[exit_index]

    def _kept(self, exit_index: int, threshold: float, memory: bool) -> Words:
        """The classes that an exit does not exclude if before it nothing was excluded or, with `memory`, everything."""
        parts = []
        for logits in torch.split(self.logits[exit_index], self._chunk):
            beta = torch.tensor(threshold, dtype=torch.float32, device=logits.device)
            before = torch.ones_like(logits, dtype=torch.bool) if memory else None
            excluded = self.policy.decide(logits, beta, before).excluded
            assert excluded is not None
            parts.append(pack(~excluded))
        return np.concatenate(parts, axis=1)

    def _rivals(self) -> tuple[Words, NDArray[np.bool_]]:
        """Classes that win over a row's own at the network's end; bool [N], where logits alone do not say it."""
        words, close = [], []
        number = torch.arange(self.classes, device=self.logits[-1].device)
        parts = (torch.split(x, self._chunk) for x in (self.logits[-1], self.device_targets))
        for logits, targets in zip(*parts, strict=True):
            ahead = logits.to(torch.float32) - logits.to(torch.float32).gather(1, targets[:, None])
            words.append(pack((ahead > 0) | ((ahead == 0) & (number < targets[:, None]))))
            close.append((~torch.isfinite(ahead) | ((ahead != 0) & (ahead.abs() < _CLOSE))).any(dim=1))
        return np.concatenate(words, axis=1), torch.cat(close).cpu().numpy()
