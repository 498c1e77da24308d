"""Finds the thresholds of a network with exits, on cached logits of the validation split.

One forward pass gives the logits of every head; from then on a trial is tensor arithmetic. All values of
one exit's threshold are tried at once: the policy's own functions run under `torch.vmap`, so the search,
PyTorch and the exported graph decide by the same algebra (METHODS §2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from edgewright.models.layers.exit_policies import ExitPolicy
from edgewright.models.layers.multi_exit import MultiExit

from ..errors import StageError
from ..stage import Json, StageConfig
from .exit_trials import ExitEvaluator, Trials

OPERATING_POINTS = (("accurate", 0.0), ("balanced", 1.0), ("fast", 3.0))
"""Name of every point and the multiple of the tolerances it may spend; strictest first."""
DEFAULT_POINT = "balanced"

_ELEMENTS_PER_SEARCH = 1 << 18  # of [rows, classes]; above it the search looks around on a sample of the rows
_ROWS_PER_SEARCH = 2000  # but never on fewer
_PRICES = (2.0, 8.0, 32.0)  # of one point of violation, in units of the whole network's MACs
_ROUNDS = 20
_WINDOW = 8  # candidates to either side
_ROUNDING = 1e-9


class ExitSearchConfig(StageConfig):
    """What the thresholds must fulfil, and how they are looked for."""

    search: Literal["coordinate", "greedy"] = "coordinate"
    """`greedy`: as published, one exit after the other (METHODS §2.5). `coordinate`: descent on the mean MACs from
    several starts, the greedy result among them, so it is never worse on validation."""
    tolerance: float = Field(default=0.005, ge=0.0, le=1.0)
    """Validation accuracy that the exits may cost, against the same network run to its end (0.005 = half a point)."""
    max_worst_class_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """The same limit for the worst class' accuracy; None sets none."""
    min_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the validation rows that every exit, the network's own end included, must take if the tolerance allows
    it; needs `search: coordinate`."""
    restarts: int = Field(default=3, ge=0)
    """Random starts of the coordinate search."""

    @model_validator(mode="after")
    def _check_search(self) -> ExitSearchConfig:
        if self.search == "greedy" and self.min_share is not None:
            raise ValueError("min_share needs search: coordinate; the published greedy search cannot aim at shares")
        return self


@dataclass(frozen=True)
class OperatingPointResult:
    """A validated setting of the thresholds.

    Attributes:
        name: ``"balanced"``, ``"accurate"``, ``"fast"``.
        thresholds: K numbers.
        metrics: accuracy, worst_class_accuracy, mean_macs, mac_share (of the deepest path), exit_share_<i>,
            and greedy_mean_macs, what the published search reaches under the same limits.
        min_share_met: every exit takes the share that was asked for; None if none was.
        trials: float64 [T, K + 2], see `Trials.table`: everything that was tried for this point.
    """

    name: str
    thresholds: tuple[float, ...]
    metrics: dict[str, float]
    min_share_met: bool | None
    trials: Tensor

    def to_json(self) -> dict[str, Json]:
        """As `metrics["operating_points"]` and the manifest have it."""
        return {"name": self.name, "thresholds": list(self.thresholds), "metrics": dict(self.metrics)}


@dataclass(frozen=True)
class Limits:
    """What a setting of the thresholds must keep to."""

    accuracy: float
    worst_class: float | None
    min_share: float | None

    def violation(self, trials: Trials) -> Tensor:
        """Float64 [T], how far each trial is outside, 0 if it keeps to everything."""
        missing = (self.accuracy - trials.accuracy).clamp(min=0.0)
        if self.worst_class is not None:
            missing = missing + (self.worst_class - trials.worst_class_accuracy).clamp(min=0.0)
        if self.min_share is not None:
            missing = missing + (self.min_share - trials.shares).clamp(min=0.0).sum(dim=1)
        return torch.where(missing > _ROUNDING, missing, 0.0)


def published_steps(policy: ExitPolicy) -> list[float]:
    """The thresholds that the published search walks through, from `never` in steps of 0.01."""
    span = policy.always - policy.never
    return [round(policy.never + span * step / 100, 6) for step in range(1, 100)]


def candidate_thresholds(policy: ExitPolicy) -> list[float]:
    """`never`, then the published steps with finer ones towards both ends, in order."""
    fine = [digit * 10.0**power for power in (-5, -4, -3) for digit in (1, 2, 3, 5, 7)]
    distances = [0.0, *fine, *(step / 100 for step in range(1, 100)), *(1.0 - d for d in reversed(fine) if d >= 1e-4)]
    return [round(policy.never + (policy.always - policy.never) * distance, 6) for distance in distances]


def search_thresholds(
    multi_exit: MultiExit,
    logits: Sequence[Tensor],
    targets: Tensor,
    exit_macs: Sequence[int],
    config: ExitSearchConfig,
    generator: torch.Generator,
) -> list[OperatingPointResult]:
    """Finds thresholds for every operating point; the default point first.

    Called by the `early_exit` stage, and again wherever the logits change, e.g. after quantization. The
    network run to its end on the same logits is what `tolerance` counts from, so a point that keeps to it
    always exists.

    Args:
        multi_exit: gives the policy; its own thresholds are neither read nor changed.
        logits: of the validation split, K + 1 tensors float [N, C], as `MultiExit.all_logits` returns them.
        targets: int64 [N].
        exit_macs: K + 1 numbers: MACs of one row that leaves there, heads included.
        config: limits and method.
        generator: of the random starts.

    Raises:
        StageError: there are no rows, or logits are not finite; names the row.
    """
    _check_logits(logits, targets)
    everything = ExitEvaluator(multi_exit.policy, logits, targets, exit_macs)
    search = _Search(everything, _sample(everything, generator), config.restarts, generator)
    plain = everything.evaluate([multi_exit.policy.never] * everything.exits)
    found: dict[str, OperatingPointResult] = {}
    for name, multiple in OPERATING_POINTS:
        drop = config.max_worst_class_drop
        limits = Limits(
            float(plain.accuracy[0]) - multiple * config.tolerance,
            None if drop is None else float(plain.worst_class_accuracy[0]) - multiple * drop,
            config.min_share,
        )
        found[name] = _search_point(name, search, limits, config)
    return [found.pop(DEFAULT_POINT), *found.values()]


def _search_point(name: str, search: _Search, limits: Limits, config: ExitSearchConfig) -> OperatingPointResult:
    everything = search.everything
    tried = len(everything.log)
    best = published = greedy(everything, limits)
    share_met: bool | None = None
    if config.search == "coordinate":
        best = search.run(limits, published)
        if limits.min_share is not None:
            share_met = float(limits.violation(best)[0]) == 0.0
            if not share_met:
                best = search.run(replace(limits, min_share=None), published)
    metrics = {
        "accuracy": float(best.accuracy[0]),
        "worst_class_accuracy": float(best.worst_class_accuracy[0]),
        "mean_macs": float(best.mean_macs[0]),
        "mac_share": float(best.mean_macs[0] / everything.exit_macs[-1]),
        **{f"exit_share_{i}": float(share) for i, share in enumerate(best.shares[0])},
        "greedy_accuracy": float(published.accuracy[0]),
        "greedy_mean_macs": float(published.mean_macs[0]),
    }
    table = torch.cat([trials.table() for trials in everything.log[tried:] or [best]])
    return OperatingPointResult(name, tuple(best.thresholds[0].tolist()), metrics, share_met, table)


def greedy(evaluator: ExitEvaluator, limits: Limits) -> Trials:
    """The published search (METHODS §2.5): exits by the MACs of their segment, each pushed until accuracy fails.

    Two differences from the release, as METHODS has them: an exit that fails at the first step is switched
    off (the release leaves it on at 0.01), and rows do not influence each other (`ExitPolicy`). The limit
    itself may be reached, so that a tolerance of 0 is not always a failure. `limits.min_share` is not
    looked at.
    """
    never, steps = evaluator.policy.never, published_steps(evaluator.policy)
    segments = torch.diff(evaluator.exit_macs, prepend=torch.zeros(1, dtype=torch.float64)).tolist()
    thresholds = [never] * evaluator.exits
    floor = replace(limits, min_share=None)
    for i in sorted(range(evaluator.exits), key=lambda j: -segments[j]):
        kept = floor.violation(evaluator.sweep(thresholds, i, steps)) == 0.0
        passed = int(kept.to(torch.int64).cumprod(dim=0).sum())
        thresholds[i] = steps[passed - 1] if passed else never
    return evaluator.evaluate(thresholds)


def _sample(everything: ExitEvaluator, generator: torch.Generator) -> ExitEvaluator:
    """Enough rows to look around in; `everything` itself where it is small."""
    rows = max(_ROWS_PER_SEARCH, _ELEMENTS_PER_SEARCH // everything.classes)
    if everything.rows <= rows:
        return everything
    return everything.sample(torch.randperm(everything.rows, generator=generator)[:rows])


class _Search:
    """Coordinate search on the mean MACs from several starts, for one set of limits after the other."""

    def __init__(
        self, everything: ExitEvaluator, sample: ExitEvaluator, restarts: int, generator: torch.Generator
    ) -> None:
        self.everything, self.sample = everything, sample
        self.restarts, self.generator = restarts, generator
        self.candidates = candidate_thresholds(everything.policy)
        # a point that keeps to strict limits keeps to loose ones: earlier results are starts of later searches
        self.starts = [[everything.policy.never] * everything.exits, _even_start(sample, self.candidates)]

    def run(self, limits: Limits, published: Trials) -> Trials:
        """The best setting found within `limits`; never worse than `published` where that keeps to them."""
        results = [self._descend(self.sample, limits, start) for start in self.starts]
        results.append(self._descend(self.sample, limits, published.thresholds[0].tolist()))
        for _ in range(self.restarts):
            picks = torch.randint(len(self.candidates), (self.everything.exits,), generator=self.generator)
            thresholds = [self.candidates[pick] for pick in picks.tolist()]
            # first with a price on violations, so that one exit can buy accuracy back from another
            for price in _PRICES:
                thresholds = self._descend(self.sample, limits, thresholds, price).thresholds[0].tolist()
            results.append(self._descend(self.sample, limits, thresholds))
        best = self._best(results, limits)
        if self.sample is not self.everything:
            # what was found on a sample is moved a little until it holds on all rows
            moved = [best.thresholds[0].tolist(), *self.starts, published.thresholds[0].tolist()]
            best = self._best([self._descend(self.everything, limits, m, window=_WINDOW) for m in moved], limits)
        self.starts.append(best.thresholds[0].tolist())
        return best

    def _best(self, results: Sequence[Trials], limits: Limits) -> Trials:
        return min(results, key=lambda r: float(self._objective(r, limits, None)[0]))

    def _objective(self, trials: Trials, limits: Limits, price: float | None) -> Tensor:
        """Float64 [T], mean MACs (1 = all rows to the end) plus a price; without `price` limits are walls."""
        # among equal costs the more accurate setting
        cost = trials.mean_macs / self.everything.exit_macs[-1] - 1e-6 * trials.accuracy
        violation = limits.violation(trials)
        if price is not None:
            return cost + price * violation
        return torch.where(violation > 0.0, 10.0 + violation, cost)

    def _descend(
        self,
        evaluator: ExitEvaluator,
        limits: Limits,
        start: Sequence[float],
        price: float | None = None,
        window: int | None = None,
    ) -> Trials:
        """Each exit in turn takes its best candidate until none improves; `window` limits it to neighbours."""
        best = evaluator.evaluate(start)
        value = float(self._objective(best, limits, price)[0])
        for _ in range(_ROUNDS):
            improved = False
            for i in torch.randperm(evaluator.exits, generator=self.generator).tolist():
                current: list[float] = best.thresholds[0].tolist()
                trials = evaluator.sweep(current, i, self._near(current[i], window))
                objective = self._objective(trials, limits, price)
                pick = int(objective.argmin())
                if float(objective[pick]) < value - 1e-12:
                    best, value, improved = trials[pick : pick + 1], float(objective[pick]), True
            if not improved:
                break
        return best

    def _near(self, threshold: float, window: int | None) -> list[float]:
        if window is None:
            return self.candidates
        at = min(range(len(self.candidates)), key=lambda j: abs(self.candidates[j] - threshold))
        return self.candidates[max(0, at - window) : at + window + 1]


def _even_start(evaluator: ExitEvaluator, candidates: Sequence[float]) -> list[float]:
    """Thresholds with which about the same number of rows leaves everywhere."""
    thresholds = [evaluator.policy.never] * evaluator.exits
    for i in range(evaluator.exits):
        shares = evaluator.sweep(thresholds, i, candidates).shares[:, i]
        thresholds[i] = candidates[int((shares - 1.0 / (evaluator.exits + 1)).abs().argmin())]
    return thresholds


def _check_logits(logits: Sequence[Tensor], targets: Tensor) -> None:
    if len(targets) == 0:
        raise StageError("the validation split has no rows, so no threshold can be chosen: give it some")
    for i, head in enumerate(logits):
        bad = ~torch.isfinite(head).all(dim=1)
        if bad.any():
            name = "the network's own end" if i == len(logits) - 1 else f"exit {i}"
            raise StageError(
                f"the logits of {name} are not finite on validation row {int(bad.nonzero()[0])} "
                f"({int(bad.sum())} such rows): the network diverged or the input holds extreme values"
            )
