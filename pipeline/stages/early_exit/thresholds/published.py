"""The published ways to set the thresholds of a network with exits, beside which the search of this package stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edgewright.models.layers.exit_policies import ExitPolicy

from .limits import Limits
from .trials import ExitEvaluator, Trials

_RATIOS = tuple(2.0 ** (step / 2) for step in range(-12, 13))
"""Rows of an exit for each row of the one before; the last ones leave nearly all to the network's end."""


def published_steps(policy: ExitPolicy) -> list[float]:
    """The thresholds that the published search walks through, from `never` in steps of 0.01."""
    span = policy.always - policy.never
    return [round(policy.never + span * step / 100, 6) for step in range(1, 100)]


def greedy(evaluator: ExitEvaluator, limits: Limits) -> Trials:
    """The published search (METHODS §2.5): exits by the MACs of their segment, each pushed until a limit fails.

    What differs from the release: an exit that fails at the first step is switched off (the release leaves it on at
    0.01); one that never fails ends at 0.99 (at 0.98 there); exits of equal cost go in the order of the network (there
    in whatever order its sort gives); rows do not influence each other (`ExitPolicy`; there every row readmits the
    favourites of all); and at the network's end excluded classes are masked, where the release multiplies their logits
    by 0, so that they win over negative ones, and counts MACs without any mask.

    The limit itself may be reached, so that a tolerance of 0 is not always a failure. `limits.min_share` is not looked
    at. For a budget, which the publication does not have, the goal for the accuracy is the highest one with which the
    search ends within the budget.
    """
    if limits.budget is None:
        return _greedy(evaluator, limits)
    free = replace(limits, budget=None)
    low, high = 0, evaluator.rows  # right rows that the goal asks for: with `low` it is cheapest
    best = _greedy(evaluator, replace(free, accuracy=0.0))
    while high - low > 1:
        goal = (low + high) // 2
        found = _greedy(evaluator, replace(free, accuracy=goal / evaluator.rows))
        if float(limits.violation(found)[0]) == 0.0:
            low, best = goal, found
        else:
            high = goal
    return best


def _greedy(evaluator: ExitEvaluator, limits: Limits) -> Trials:
    never, steps = evaluator.policy.never, published_steps(evaluator.policy)
    segments = torch.diff(evaluator.exit_macs, prepend=torch.zeros(1, dtype=torch.float64)).tolist()
    thresholds = [never] * evaluator.exits
    floor = replace(limits, min_share=None)
    for i in sorted(range(evaluator.exits), key=lambda j: -segments[j]):
        kept = floor.violation(evaluator.sweep(thresholds, i, steps)) == 0.0
        passed = int(kept.to(torch.int64).cumprod(dim=0).sum())
        thresholds[i] = steps[passed - 1] if passed else never
    return evaluator.evaluate(thresholds)


def geometric_schedules(evaluator: ExitEvaluator, sample: ExitEvaluator, halvings: int = 20) -> list[Trials]:
    """MSDNet's schedules (METHODS §7.1, arXiv 1703.09844), cheapest first: an exit takes a multiple of the last one's.

    The thresholds are the quantiles that give these shares on `sample`, some or all rows of `evaluator`. The last entry
    is the network run to its end. `halvings` of the thresholds' range is how finely quantiles are found.
    """
    found = []
    for ratio in _RATIOS:
        shares = torch.tensor([ratio**k for k in range(evaluator.exits + 1)], dtype=torch.float64)
        found.append(evaluator.evaluate(_quantiles(sample, (shares / shares.sum()).tolist(), halvings)))
    found.sort(key=lambda trials: float(trials.mean_cost[0]))
    return [*found, evaluator.evaluate([evaluator.policy.never] * evaluator.exits)]


def geometric(schedules: Sequence[Trials], limits: Limits) -> Trials:
    """Of `geometric_schedules` the cheapest within `limits`; with a budget, as published, the one that spends most.

    Where none keeps to the limits, the one that is least outside.
    """
    violations = [float(limits.violation(trials)[0]) for trials in schedules]
    within = [trials for trials, violation in zip(schedules, violations, strict=True) if violation == 0.0]
    if not within:
        return schedules[violations.index(min(violations))]
    return within[0] if limits.budget is None else within[-1]


def _quantiles(evaluator: ExitEvaluator, shares: Sequence[float], halvings: int) -> list[float]:
    """Thresholds with which these shares of all rows leave at the exits, as nearly as the rows allow, never more."""
    policy = evaluator.policy
    excluded: Tensor | None = None
    rows = torch.arange(evaluator.rows, device=evaluator.device)
    thresholds: list[float] = []
    for i in range(evaluator.exits):
        logits, wanted = evaluator.logits[i][rows], shares[i] * evaluator.rows
        few, many = policy.never, policy.always
        sure, open_rows = 0, torch.arange(len(rows), device=rows.device)  # who leaves with `few`; who only with `many`
        for _ in range(halvings):
            middle = (few + many) / 2
            before = None if excluded is None else excluded[open_rows]
            decided = policy.decide(logits[open_rows], torch.tensor(middle, device=logits.device), before).decided
            leaving = sure + int(decided.sum())
            if leaving > wanted + 0.5:
                many, open_rows = middle, open_rows[decided]
            else:
                few, sure, open_rows = middle, leaving, open_rows[~decided]
        thresholds.append(few)
        excluded, decided, _ = policy.decide(logits, torch.tensor(few, device=logits.device), excluded)
        rows, excluded = rows[~decided], None if excluded is None else excluded[~decided]
    return thresholds
