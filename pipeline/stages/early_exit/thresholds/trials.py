"""Applies thresholds of a network with exits to cached logits: thousands of trials a second, by the policy's rules."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.edge_runtime.measure.paired import paired_error
from edgewright.models.layers.exit_policies import ExitPolicy

from .confidence import ConfidenceTrials
from .exclusion import ExclusionTrials

_ELEMENTS_PER_CHUNK = 1 << 20  # of [trials, rows, classes], small enough to stay in a cache


@dataclass(frozen=True)
class Trials:
    """Settings of the thresholds and what they gave; T of them, tensors on the CPU.

    Attributes:
        thresholds: float64 [T, K].
        accuracy: float64 [T].
        worst_class_accuracy: float64 [T], of the classes that have samples.
        mean_macs: float64 [T], per row.
        mean_cost: float64 [T], per row in units of the deepest path: of its MACs, or of its latency where given.
        shares: float64 [T, K + 1], of the rows leaving at each exit.
        wrong_exclusions: float64 [T], share of the rows that end with their true class excluded; 0 for policies without
            memory of classes.
        accuracy_error: float64 [T], standard error of the difference of `accuracy` to that of the network run to its
            end, from the rows that are right with one and wrong with the other.
    """

    thresholds: Tensor
    accuracy: Tensor
    worst_class_accuracy: Tensor
    mean_macs: Tensor
    mean_cost: Tensor
    shares: Tensor
    wrong_exclusions: Tensor
    accuracy_error: Tensor

    def __getitem__(self, rows: slice) -> Trials:
        return Trials(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.accuracy)

    def table(self) -> Tensor:
        """Float64 [T, K + 2]: thresholds, accuracy, mean MACs; one line of the trial curves each."""
        return torch.cat([self.thresholds, self.accuracy[:, None], self.mean_macs[:, None]], dim=1)


def candidate_thresholds(policy: ExitPolicy) -> list[float]:
    """`never`, then the published steps with finer ones towards both ends, in order."""
    fine = [digit * 10.0**power for power in (-5, -4, -3) for digit in (1, 2, 3, 5, 7)]
    distances = [0.0, *fine, *(step / 100 for step in range(1, 100)), *(1.0 - d for d in reversed(fine) if d >= 1e-4)]
    return [round(policy.never + (policy.always - policy.never) * distance, 6) for distance in distances]


class ExitEvaluator:
    """Applies thresholds to cached logits of N rows.

    Args:
        policy: decides.
        logits: K + 1 tensors float [N, C], as `MultiExit.all_logits` returns them.
        targets: int64 [N].
        exit_macs: K + 1 numbers: MACs of one row that leaves there.
        exit_latency: K + 1 numbers: microseconds of one row that leaves there, where the search is to go by them.
    """

    def __init__(
        self,
        policy: ExitPolicy,
        logits: Sequence[Tensor],
        targets: Tensor,
        exit_macs: Sequence[int],
        exit_latency: Sequence[float] | None = None,
    ) -> None:
        self.policy = policy
        self.logits = [x.detach() for x in logits]
        self.device = self.logits[0].device
        self.targets = targets.to(self.device)
        self.exits = len(logits) - 1
        self.rows, self.classes = self.logits[0].shape
        self.exit_macs = torch.tensor(list(exit_macs), dtype=torch.float64)
        costs = self.exit_macs if exit_latency is None else torch.tensor(list(exit_latency), dtype=torch.float64)
        self.exit_costs = costs / costs[-1]
        self.class_rows = torch.bincount(self.targets, minlength=self.classes).cpu()
        self.at_the_end = policy.finish(self.logits[-1], None).argmax(dim=1) == self.targets
        """Bool [N]: right where no row leaves early."""
        self.error_rows = self.rows  # whose standard error counts
        self.log: list[Trials] = []
        self._known: dict[Hashable, Trials] = {}
        self.fast: ExclusionTrials | ConfidenceTrials | None = None
        if policy.classwise:
            self.fast = ExclusionTrials(
                policy, self.logits, self.targets, self.at_the_end, candidate_thresholds(policy)
            )
        elif not policy.excludes:
            self.fast = ConfidenceTrials(policy, self.logits, self.targets, self.at_the_end)

    def sample(self, rows: Tensor) -> ExitEvaluator:
        """The same for some of the rows, int64 [n]; standard errors are those of all rows."""
        rows = rows.to(self.device)
        macs = [int(m) for m in self.exit_macs]
        costs = self.exit_costs.tolist()
        some = ExitEvaluator(self.policy, [x[rows] for x in self.logits], self.targets[rows], macs, costs)
        some.error_rows = self.error_rows
        return some

    def evaluate(self, thresholds: Sequence[float]) -> Trials:
        """One trial."""
        return self.sweep(thresholds, self.exits - 1, thresholds[-1:])

    def sweep(self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]) -> Trials:
        """Tries `values` as the threshold of one exit while the others stay: T = len(values) trials.

        Remembers what it was asked: descents from several starts and for several limits meet again and again.
        """
        key = (exit_index, tuple(thresholds[:exit_index]), tuple(thresholds[exit_index + 1 :]), tuple(values))
        if key not in self._known:
            self._known[key] = self._sweep(thresholds, exit_index, values)
            self.log.append(self._known[key])
        return self._known[key]

    def _sweep(self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]) -> Trials:
        table = torch.tensor(list(thresholds), dtype=torch.float64).repeat(len(values), 1)
        table[:, exit_index] = torch.tensor(list(values), dtype=torch.float64)
        if self.fast is None:
            return self._summary(table, *self._decide_all(thresholds, exit_index, values))
        counts = self.fast.sweep(thresholds, exit_index, values)
        return self._summary(table, *(torch.from_numpy(count).to(torch.float64) for count in counts))

    def _decide_all(
        self, thresholds: Sequence[float], exit_index: int, values: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For any policy: the `Counts` that a fast path returns, float64."""
        given = torch.tensor(list(thresholds), dtype=torch.float32, device=self.device)
        tried = torch.tensor(list(values), dtype=torch.float32, device=self.device)
        hits = torch.zeros(len(values), self.classes, dtype=torch.float64, device=self.device)
        leaving = torch.zeros(len(values), self.exits + 1, dtype=torch.float64, device=self.device)
        wrong = torch.zeros(len(values), dtype=torch.float64, device=self.device)
        flips = torch.zeros(len(values), dtype=torch.float64, device=self.device)
        excluded: Tensor | None = None
        rows = torch.arange(self.rows, device=self.device)
        for i in range(exit_index):  # what comes before is the same for all trials
            excluded, decided, scores = self.policy.decide(self.logits[i][rows], given[i], excluded)
            right = decided & (scores.argmax(dim=1) == self.targets[rows])
            hits += torch.bincount(self.targets[rows[right]], minlength=self.classes)
            flips += (decided & (right != self.at_the_end[rows])).sum()
            leaving[:, i] += decided.sum()
            if excluded is not None:
                wrong += (decided & ~right).sum()
            rows, excluded = rows[~decided], None if excluded is None else excluded[~decided]
        size = max(1, _ELEMENTS_PER_CHUNK // (len(values) * self.classes))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            before = None if excluded is None else excluded[chunk]
            right, lost, exit_of_row = self._outcomes(given, exit_index, tried, rows[chunk], before)
            wrong += lost.sum(dim=1)
            hits.index_add_(1, self.targets[rows[chunk]], right.to(torch.float64))
            flips += (right != self.at_the_end[rows[chunk]]).sum(dim=1)
            for i in range(exit_index, self.exits + 1):
                leaving[:, i] += (exit_of_row == i).sum(dim=1)
        return hits.cpu(), leaving.cpu(), wrong.cpu(), flips.cpu()

    def _outcomes(
        self, given: Tensor, first: int, values: Tensor, rows: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each of `rows`: right and true class excluded, bool [T, n], and where it leaves, int64 [T, n]."""
        here = self.logits[first][rows]

        def decide(value: Tensor) -> tuple[Tensor, ...]:
            excluded, decided, scores = self.policy.decide(here, value, before)
            return (decided, scores) if excluded is None else (decided, scores, excluded)

        decided, scores, *memory = torch.vmap(decide)(values)
        # A threshold works on what follows through `decided` and `excluded` alone, and neighbouring values
        # mostly agree in both: what follows is computed once for each run of equal states of a row.
        new = torch.ones_like(decided)
        new[1:] = decided[1:] != decided[:-1]
        for excluded in memory:
            new[1:] |= (excluded[1:] != excluded[:-1]).any(dim=2)
        run_of = torch.zeros(new.shape, dtype=torch.int64, device=self.device)
        run_of[new] = torch.arange(int(new.sum()), device=self.device)
        run_of = run_of.cummax(dim=0).values  # numbered trial by trial, so a row's own number only grows
        at = new.nonzero(as_tuple=True)
        excluded_at = memory[0][at] if memory else None
        right, lost, exit_of_row = self._follow(given, first, rows[at[1]], decided[at], scores[at], excluded_at)
        return right[run_of], lost[run_of], exit_of_row[run_of]

    def _follow(
        self, given: Tensor, first: int, rows: Tensor, decided: Tensor, scores: Tensor, excluded: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From what exit `first` said to the end: right and true class excluded, bool [n], exit index int64 [n]."""
        targets = self.targets[rows]
        right, lost = torch.zeros_like(decided), torch.zeros_like(decided)
        exit_of_row = torch.full_like(rows, self.exits)
        alive = torch.arange(len(rows), device=self.device)
        for i in range(first, self.exits):
            if i > first:
                excluded, decided, scores = self.policy.decide(self.logits[i][rows[alive]], given[i], excluded)
            leaving = alive[decided]
            right[leaving] = scores[decided].argmax(dim=1) == targets[leaving]
            exit_of_row[leaving] = i
            alive = alive[~decided]
            if excluded is not None:
                # a row that leaves has one class left: its own, or it is excluded
                lost[leaving] = ~right[leaving]
                excluded = excluded[~decided]
        right[alive] = self.policy.finish(self.logits[-1][rows[alive]], excluded).argmax(dim=1) == targets[alive]
        if excluded is not None:
            lost[alive] = excluded.gather(1, targets[alive, None])[:, 0]
        return right, lost, exit_of_row

    def _summary(self, thresholds: Tensor, hits: Tensor, leaving: Tensor, wrong: Tensor, flips: Tensor) -> Trials:
        present = self.class_rows > 0
        worst = (hits[:, present] / self.class_rows[present]).amin(dim=1)
        shares = leaving / self.rows
        accuracy = hits.sum(dim=1) / self.rows
        lost = accuracy - self.at_the_end.to(torch.float64).mean().cpu()
        return Trials(
            thresholds=thresholds,
            accuracy=accuracy,
            worst_class_accuracy=worst,
            mean_macs=shares @ self.exit_macs,
            mean_cost=shares @ self.exit_costs,
            shares=shares,
            wrong_exclusions=wrong / self.rows,
            accuracy_error=torch.from_numpy(paired_error((flips / self.rows).numpy(), lost.numpy(), self.error_rows)),
        )
