"""Finds the thresholds of a network with exits, on cached logits of the validation split.

One forward pass gives the logits of every head; from then on a trial is tensor arithmetic. All values of
one exit's threshold are tried at once by the policy's own functions, so the search, PyTorch and the exported
graph decide by the same algebra (METHODS §2.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgewright.edge_runtime.measure.paired import standard_errors
from edgewright.models.layers.multi_exit import MultiExit

from ....errors import StageError
from ....stage import Json
from .limits import ExitSearchConfig, Limits, budget_name
from .published import geometric, geometric_schedules, greedy
from .trials import ExitEvaluator, Trials, candidate_thresholds

OPERATING_POINTS = (("accurate", 0.0), ("balanced", 1.0), ("fast", 3.0))
"""Name of every point and the multiple of the tolerances it may spend; strictest first."""
DEFAULT_POINT = "balanced"

_ELEMENTS_PER_SEARCH = 1 << 18  # of [rows, classes]; above it the search looks around on a sample of the rows
_ROWS_PER_SEARCH = 2000  # but never on fewer
_PRICES = (2.0, 8.0, 32.0)  # of one point of violation, in units of the deepest path's cost, or of accuracy
_ROUNDS = 20
_WINDOW = 8  # candidates to either side


@dataclass(frozen=True)
class OperatingPointResult:
    """A validated setting of the thresholds.

    Attributes:
        name: ``"balanced"``, ``"accurate"``, ``"fast"``, ``"budget_<percent>"``.
        thresholds: K numbers.
        metrics: accuracy, accuracy_error (`Trials`), worst_class_accuracy, wrong_exclusions, mean_macs, mac_share (of
            the deepest path), mean_latency_us where the search went by latency, exit_share_<i>, and what the published
            searches reach under the same limits: greedy_accuracy, greedy_mean_macs, geometric_accuracy,
            geometric_mean_macs.
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
    table = config.latency_table
    if table is not None and len(table.exits) != len(logits):
        raise StageError(
            f"early_exit.latency_table has {len(table.exits)} numbers for {len(logits) - 1} exits and the network's "
            f"end: {len(logits)} are needed; measure a network with the same exits"
        )
    everything = ExitEvaluator(multi_exit.policy, logits, targets, exit_macs, None if table is None else table.exits)
    search = ThresholdSearch(everything, config.restarts, generator)
    found = {name: _search_point(name, search, limits, config) for name, limits in _points(everything, config)}
    return [found.pop(DEFAULT_POINT), *found.values()]


def default_limits(everything: ExitEvaluator, config: ExitSearchConfig, multiple: float = 1.0) -> Limits:
    """What an operating point keeps to that may spend so many times the tolerances."""
    plain = everything.evaluate([everything.policy.never] * everything.exits)
    drop = config.max_worst_class_drop
    return Limits(
        accuracy=float(plain.accuracy[0]) - multiple * config.tolerance,
        errors=standard_errors(config.confidence),
        worst_class=None if drop is None else float(plain.worst_class_accuracy[0]) - multiple * drop,
        min_share=config.min_share,
        wrong_exclusion=config.max_wrong_exclusion,
    )


def _points(everything: ExitEvaluator, config: ExitSearchConfig) -> list[tuple[str, Limits]]:
    """Every operating point with what it has to keep to; strict ones first."""
    points = [(name, default_limits(everything, config, multiple)) for name, multiple in OPERATING_POINTS]
    for budget in config.budgets:
        limits = Limits(min_share=config.min_share, wrong_exclusion=config.max_wrong_exclusion, budget=budget)
        points.append((budget_name(budget), limits))
    return points


def _search_point(name: str, search: ThresholdSearch, limits: Limits, config: ExitSearchConfig) -> OperatingPointResult:
    everything = search.everything
    tried = len(everything.log)
    published = search.published(limits)
    share_met: bool | None = None
    if config.search == "coordinate":
        best = search.run(limits, published.values())
        if limits.min_share is not None:
            share_met = float(limits.violation(best)[0]) == 0.0
            if not share_met:
                best = search.run(replace(limits, min_share=None), published.values())
    else:
        best = published[config.search]
    metrics = {
        "accuracy": float(best.accuracy[0]),
        "accuracy_error": float(best.accuracy_error[0]),
        "worst_class_accuracy": float(best.worst_class_accuracy[0]),
        "wrong_exclusions": float(best.wrong_exclusions[0]),
        "mean_macs": float(best.mean_macs[0]),
        "mac_share": float(best.mean_macs[0] / everything.exit_macs[-1]),
        **{f"exit_share_{i}": float(share) for i, share in enumerate(best.shares[0])},
    }
    for other, trials in published.items():
        metrics[f"{other}_accuracy"] = float(trials.accuracy[0])
        metrics[f"{other}_mean_macs"] = float(trials.mean_macs[0])
    if config.latency_table is not None:
        metrics["mean_latency_us"] = float(best.mean_cost[0]) * config.latency_table.exits[-1]
    table = torch.cat([trials.table() for trials in everything.log[tried:] or [best]])
    return OperatingPointResult(name, tuple(best.thresholds[0].tolist()), metrics, share_met, table)


def _sample(everything: ExitEvaluator, generator: torch.Generator) -> ExitEvaluator:
    """Enough rows to look around in; `everything` itself where it is small."""
    rows = max(_ROWS_PER_SEARCH, _ELEMENTS_PER_SEARCH // everything.classes)
    if everything.rows <= rows:
        return everything
    return everything.sample(torch.randperm(everything.rows, generator=generator)[:rows])


class ThresholdSearch:
    """Coordinate search from several starts, for one set of limits after the other; and the published ones."""

    def __init__(self, everything: ExitEvaluator, restarts: int, generator: torch.Generator) -> None:
        """Prepares the starts.

        Args:
            everything: the rows whose limits count; where they are many, a sample of them is looked around in.
            restarts: random starts.
            generator: of sample, random starts and order of the exits.
        """
        self.everything, self.sample = everything, _sample(everything, generator)
        self.restarts, self.generator = restarts, generator
        self.candidates = candidate_thresholds(everything.policy)
        self.schedules = geometric_schedules(everything, self.sample)
        # a point that keeps to strict limits keeps to loose ones: earlier results are starts of later searches
        self.starts = [[everything.policy.never] * everything.exits]

    def published(self, limits: Limits) -> dict[str, Trials]:
        """What the published searches find, by name."""
        return {"greedy": greedy(self.everything, limits), "geometric": geometric(self.schedules, limits)}

    def run(self, limits: Limits, published: Iterable[Trials]) -> Trials:
        """The best setting found within `limits`; never worse than those `published` that keep to them."""
        given = [trials.thresholds[0].tolist() for trials in published]
        results = [self._descend(self.sample, limits, start) for start in [*self.starts, *given]]
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
            moved = [best.thresholds[0].tolist(), *self.starts, *given]
            best = self._best([self._descend(self.everything, limits, m, window=_WINDOW) for m in moved], limits)
        self.starts.append(best.thresholds[0].tolist())
        return best

    def _best(self, results: Sequence[Trials], limits: Limits) -> Trials:
        return min(results, key=lambda r: float(limits.objective(r)[0]))

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
        value = float(limits.objective(best, price)[0])
        for _ in range(_ROUNDS):
            improved = False
            for i in torch.randperm(evaluator.exits, generator=self.generator).tolist():
                current: list[float] = best.thresholds[0].tolist()
                trials = evaluator.sweep(current, i, self._near(current[i], window))
                objective = limits.objective(trials, price)
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
