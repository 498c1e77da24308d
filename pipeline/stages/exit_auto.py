"""Finds places for exits by what they are worth: cheap heads everywhere, then the subset that saves most.

Candidates come from the structure alone: modules whose output is all that the rest of the network knows of one of its
inputs. On the features of the untouched network one head is trained for each, all in one pass, and from then on a
subset of places is judged on cached logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import ExitPolicy

from .. import cost
from .exit_limits import Limits
from .exit_placement import LATEST, Place, places
from .exit_published import geometric, geometric_schedules
from .exit_trials import ExitEvaluator

MOST_CANDIDATES = 24
_ROWS = 2000
_SUBSETS = 64  # up to so many are all tried
_HALVINGS = 12


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
        mean_cost: of a validation row, in units of the deepest path.
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
    """The `count` of M candidates with the least mean cost that keep to the limits; exact where there are few subsets.

    Otherwise the best candidate is added one by one, then single ones are exchanged until nothing improves. A subset is
    judged by the best of the geometric schedules of its thresholds, so that nothing is random.

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
    known: dict[tuple[int, ...], tuple[bool, float]] = {}

    def judge(subset: Iterable[int]) -> tuple[bool, float]:
        chosen = tuple(sorted(subset))
        if chosen not in known:
            known[chosen] = _judge(policy, logits, targets, macs, head_macs, chosen, limits)
        return known[chosen]

    candidates = range(len(macs) - 1)
    count = min(count, len(candidates))
    if math.comb(len(candidates), count) <= _SUBSETS:
        best = min(combinations(candidates, count), key=judge)
    else:
        best = ()
        for _ in range(count):
            best = min((tuple(sorted((*best, c))) for c in candidates if c not in best), key=judge)
        improved = True
        while improved:
            swaps = [tuple(sorted({*best, new} - {old})) for old in best for new in candidates if new not in best]
            other = min(swaps, key=judge)
            improved = judge(other) < judge(best)
            best = other if improved else best
    outside, mean_cost = judge(best)
    return Placement(tuple(best), mean_cost, not outside, len(known))


def _judge(
    policy: ExitPolicy,
    logits: Sequence[Tensor],
    targets: Tensor,
    macs: Sequence[int],
    head_macs: Sequence[int],
    chosen: Sequence[int],
    limits: Callable[[ExitEvaluator], Limits],
) -> tuple[bool, float]:
    passed, costs = 0, []
    for c in chosen:
        passed += head_macs[c]
        costs.append(macs[c] + passed)
    costs.append(macs[-1] + passed)
    evaluator = ExitEvaluator(policy, [*(logits[c] for c in chosen), logits[-1]], targets, costs)
    bound = limits(evaluator)
    best = geometric(geometric_schedules(evaluator, evaluator, _HALVINGS), bound)
    # in units of the network without exits, so that heads count and subsets can be compared
    return float(bound.violation(best)[0]) > 0.0, float(best.mean_macs[0]) / macs[-1]
