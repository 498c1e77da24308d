"""Finds places for exits by what they are worth: cheap heads everywhere, then the subset that saves most.

Candidates come from the structure alone: modules whose output is all that the rest of the network knows of one of its
inputs. On the features of the untouched network one head is trained for each, all in one pass, and from then on a
subset of places is judged on cached logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import ExitPolicy

from ...analysis import cost
from .placement import LATEST, Place, places
from .thresholds.limits import Limits
from .thresholds.published import geometric, geometric_schedules
from .thresholds.search import ThresholdSearch
from .thresholds.trials import ExitEvaluator, Trials

MOST_CANDIDATES = 24
_ROWS = 2000
_SUBSETS = 64  # up to so many are all tried
_HALVINGS = 12
_SEARCHED = 4  # of the best subsets, with the search that sets the thresholds in the end

_Verdict: TypeAlias = tuple[bool, float]
"""Whether the limits fail, and the mean cost in units of the network without exits; smaller is better."""


def boundaries(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Place]:
    """Places, in order of depth, after which one tensor is all that the network knows of at least one of its inputs.

    Found by trying: with the module's output held at what it was for one row, another row in that input must not change
    the logits. Inside a residual branch it does, through the shortcut. Of places at the same cost the outermost stays.

    Args:
        model: a classifier, called positionally.
        inputs: a batch of several rows.
    """
    model.eval()
    total = cost.count(model, inputs).macs
    found: dict[int, Place] = {}
    for place in sorted(places(model, inputs).values(), key=lambda p: (p.macs, p.path.count("."), -p.order)):
        known = place.macs in found or not 0 < place.macs <= LATEST * total
        if not known and _absorbs(model, inputs, place.path):
            found[place.macs] = place
    chosen = list(found.values())
    if len(chosen) > MOST_CANDIDATES:
        step = (len(chosen) - 1) / (MOST_CANDIDATES - 1)
        chosen = [chosen[round(i * step)] for i in range(MOST_CANDIDATES)]
    return chosen


@torch.no_grad()
def _absorbs(model: nn.Module, inputs: tuple[Tensor, ...], path: str) -> bool:
    row = tuple(x[:1] for x in inputs)
    kept: list[Tensor] = []

    def hold(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not kept:
            kept.append(output.clone())
        # a copy: what follows may write into it
        return kept[0].clone()

    handle = model.get_submodule(path).register_forward_hook(hold)
    try:
        logits = model(*row)
        for i, x in enumerate(inputs):
            others = [r for r in range(1, len(x)) if not torch.equal(x[r : r + 1], row[i])]
            if others:
                changed = (*row[:i], x[others[0] : others[0] + 1], *row[i + 1 :])
                if torch.equal(model(*changed), logits):
                    return True
    finally:
        handle.remove()
    return False


@dataclass(frozen=True)
class Placement:
    """The subset that was found.

    Attributes:
        chosen: indices of the candidates, in order of depth.
        mean_cost: of a validation row, in units of the network without exits.
        within: whether the limits hold with these exits.
        tried: subsets that were judged.
    """

    chosen: tuple[int, ...]
    mean_cost: float
    within: bool
    tried: int


def choose_subset(
    policy: ExitPolicy,
    logits: Sequence[Tensor],
    targets: Tensor,
    macs: Sequence[int],
    head_macs: Sequence[int],
    count: int,
    limits: Callable[[ExitEvaluator], Limits],
) -> Placement:
    """At most `count` of M candidates, with the least mean cost that keeps to the limits.

    All subsets of that size are judged by the best of their geometric schedules where there are few; otherwise the best
    candidate is added one by one, then single ones are exchanged until nothing improves. The best of them are judged
    again by the coordinate search, from these schedules on: an exit that it leaves without rows is left out. Nothing
    is random.

    Args:
        policy: decides.
        logits: M + 1 tensors float [N, C], the network's own end last.
        targets: int64 [N].
        macs: M + 1 numbers: executed in the network at each candidate and at its end, without heads.
        head_macs: M numbers.
        count: of exits wanted.
        limits: what has to hold, given the logits of the network's own end and of some exits.
    """
    if len(targets) > _ROWS:
        # rows may be sorted by class: an even stride sees all of them
        rows = torch.linspace(0, len(targets) - 1, _ROWS).long()
        logits, targets = [x[rows] for x in logits], targets[rows]
    trial = _Trial(policy, logits, targets, macs, head_macs, limits)
    candidates = range(len(macs) - 1)
    count = min(count, len(candidates))
    if math.comb(len(candidates), count) <= _SUBSETS:
        for subset in combinations(candidates, count):
            trial.by_schedule(subset)
    else:
        best: tuple[int, ...] = ()
        for _ in range(count):
            best = min((tuple(sorted((*best, c))) for c in candidates if c not in best), key=trial.by_schedule)
        improved = True
        while improved:
            swaps = [tuple(sorted({*best, new} - {old})) for old in best for new in candidates if new not in best]
            other = min(swaps, key=trial.by_schedule)
            improved = trial.by_schedule(other) < trial.by_schedule(best)
            best = other if improved else best
    full = [subset for subset in trial.known if len(subset) == count]
    finalists = dict(map(trial.by_search, sorted(full, key=trial.by_schedule)[:_SEARCHED]))
    chosen = min(finalists, key=lambda subset: (finalists[subset], len(subset)))
    outside, mean_cost = finalists[chosen]
    return Placement(chosen, mean_cost, not outside, len(trial.known))


class _Trial:
    """Judges subsets of candidates on cached logits; arguments as of `choose_subset`."""

    def __init__(
        self,
        policy: ExitPolicy,
        logits: Sequence[Tensor],
        targets: Tensor,
        macs: Sequence[int],
        head_macs: Sequence[int],
        limits: Callable[[ExitEvaluator], Limits],
    ) -> None:
        self.policy, self.logits, self.targets, self.limits = policy, logits, targets, limits
        self.macs, self.head_macs = macs, head_macs
        self.known: dict[tuple[int, ...], _Verdict] = {}

    def by_schedule(self, subset: tuple[int, ...]) -> _Verdict:
        """With the best of the geometric schedules of its thresholds."""
        if subset not in self.known:
            evaluator = self._evaluator(subset)
            bound = self.limits(evaluator)
            best = geometric(geometric_schedules(evaluator, evaluator, _HALVINGS), bound)
            self.known[subset] = self._verdict(best, bound)
        return self.known[subset]

    def by_search(self, subset: tuple[int, ...]) -> tuple[tuple[int, ...], _Verdict]:
        """With thresholds as they are searched in the end; of `subset` without the exits that no row takes then."""
        evaluator = self._evaluator(subset)
        bound = self.limits(evaluator)
        search = ThresholdSearch(evaluator, 0, torch.Generator().manual_seed(0))
        best = search.run(bound, search.published(bound).values())
        used = tuple(c for c, share in zip(subset, best.shares[0].tolist(), strict=False) if share > 0.0)
        if used and used != subset:
            return self.by_search(used)
        return subset, self._verdict(best, bound)

    def _evaluator(self, subset: Iterable[int]) -> ExitEvaluator:
        chosen = list(subset)
        passed = list(accumulate(self.head_macs[c] for c in chosen))
        costs = [self.macs[c] + heads for c, heads in zip(chosen, passed, strict=True)]
        logits = [*(self.logits[c] for c in chosen), self.logits[-1]]
        return ExitEvaluator(self.policy, logits, self.targets, [*costs, self.macs[-1] + passed[-1]])

    def _verdict(self, trials: Trials, bound: Limits) -> _Verdict:
        # in units of the network without exits, so that heads count and subsets can be compared
        return float(bound.violation(trials)[0]) > 0.0, float(trials.mean_macs[0]) / self.macs[-1]
