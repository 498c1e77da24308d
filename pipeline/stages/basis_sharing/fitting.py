"""Bases and coefficients for a model's layers: from calibration data to tensors, which the stage then installs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor, nn

from ...analysis.layers import KINDS, Layer, Skipped, discover
from ...errors import StageError
from ...stage import Context, Json
from ...task import Split, Task
from .config import BasisSharingConfig
from .factorization import Factors, balanced, kept_share
from .grouping import Candidate, candidates, select
from .norms import Calibration, Norms, collect
from .rank_allocation import RankDemand, allocate_ranks
from .solver import Algebra, Budget, decision_report, divided, group_report, passes, summary


@dataclass(frozen=True)
class Outcome:
    """JSON, and per group the tensors ``<group>.basis``, ``<group>.<member>`` and ``<group>.spectrum``."""

    data: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


def fit_factors(
    model: nn.Module,
    task: Task,
    config: BasisSharingConfig,
    context: Context,
    statistics: Callable[[nn.Module, Task, Sequence[Candidate], Calibration, Context], Norms] = collect,
) -> Outcome:
    """Chooses groups, ranks, bases and coefficients for `model`, which is not changed.

    Args:
        model: see `fit` of the stage, as for the next three.
        task: gives the calibration split.
        config: how to factorize.
        context: see `Context`.
        statistics: what runs the calibration data through the model; comparisons of methods keep what it found.

    Raises:
        StageError: see `fit` of the stage.
    """
    model.to(context.device).eval()
    split = task.splits["calibration"]
    calibration = Calibration(
        config.whitening,
        calibration_rows(split, config, context),
        min(config.calibration_batch, getattr(split, "largest_batch", config.calibration_batch)),
        config.max_rows,
        config.gradient_labels,
        config.scale_exponent,
    )
    graph = discover(model, split.batch(calibration.rows[:2]).to(context.device).inputs)
    layers, left = select(graph, config.layers.include, config.layers.exclude, config.min_width)
    left += [Skipped(layer.path, "its weight is all zero") for layer in layers if not _has_weight(model, layer)]
    layers = [layer for layer in layers if _has_weight(model, layer)]
    if not layers:
        return _nothing(left, config)
    found = candidates(layers, config.groups, config.group_size, config.layers.private)
    fitting = _Fitting(
        model, config, context, calibration, lambda run: statistics(model, task, run, calibration, context)
    )
    runs = list(passes(found, calibration.weights_kept))
    for run in runs:
        fitting.divide(run, last=len(runs) == 1)
    fitting.allocate()
    left += [Skipped(layer.path, "no rank at this ratio saves weights") for layer in fitting.dense]
    totals, notes = summary(fitting.rows)
    dense = [{"path": s.path, "reason": s.reason} for s in left]
    report = {**totals, "groups": fitting.rows, "decisions": fitting.decisions, "dense": dense}
    return Outcome({"groups": fitting.groups, "metrics": report, "notes": notes}, fitting.tensors)


class _Fitting:
    """The groups of one model on their way from candidates to factors."""

    def __init__(
        self,
        model: nn.Module,
        config: BasisSharingConfig,
        context: Context,
        calibration: Calibration,
        statistics: Callable[[list[Candidate]], Norms],
    ) -> None:
        self.model, self.config, self.context, self.calibration = model, config, context, calibration
        self.statistics = statistics
        self.budget = Budget(lambda candidate: _kept(candidate, config), 1 if config.rank is not None else config.align)
        self.groups: list[Json] = []
        self.rows: list[dict[str, Json]] = []
        self.decisions: list[Json] = []
        self.tensors: dict[str, Tensor] = {}
        self.dense: list[Layer] = []
        self._waiting: list[tuple[Candidate, RankDemand]] = []
        self._norms: Norms | None = None

    def divide(self, run: list[Candidate], last: bool) -> None:
        """Decides who shares, and factorizes at uniform ranks where these are final.

        Args:
            run: candidates whose statistics fit into memory together.
            last: no other run follows, so that the statistics can serve `allocate` too.
        """
        norms = self.statistics(run)
        self._norms = norms if last else None
        for candidate in self.context.progress.track(run, "basis_sharing: groups"):
            algebra = self._algebra(candidate, norms)
            division = divided(candidate, algebra, self.budget, self.config.share)
            self.decisions.append(decision_report(candidate, division, self.config.share))
            keep = self.budget.keep(candidate)
            for group in division.groups:
                rank = self.budget.rank(group, keep)
                if rank is None:
                    self.dense += group.members
                elif self.config.ranks == "loss":
                    self._waiting.append((group, self._demand(group, rank, algebra)))
                else:
                    self._record(group, rank, algebra, norms)

    def allocate(self) -> None:
        """Spreads the budget over the groups that wait for a rank, and factorizes them."""
        if not self._waiting:
            return
        groups = [group for group, _ in self._waiting]
        demands = [demand for _, demand in self._waiting]
        budget = sum(int(self.budget.keep(group) * group.fan_in * sum(group.widths)) for group in groups)
        ranks = allocate_ranks(demands, budget, self.config.rank_floor, self.config.spectrum_power)
        rank_of = dict(zip(groups, ranks, strict=True))
        for run in passes(groups, self.calibration.weights_kept):
            norms = self._norms or self.statistics(run)
            for group in self.context.progress.track(run, "basis_sharing: ranks"):
                self._record(group, rank_of[group], self._algebra(group, norms), norms)

    def _algebra(self, candidate: Candidate, norms: Norms) -> Algebra:
        matrices = {x.path: matrix_of(self.model, x).to(norms.device, torch.float64) for x in candidate.members}
        metrics = norms.metrics(candidate.members)
        return Algebra(matrices, metrics, norms.targets(candidate.members, matrices), self.config.refit)

    def _demand(self, group: Candidate, uniform: int, algebra: Algebra) -> RankDemand:
        inputs = len({id(algebra.metrics[layer.path]) for layer in group.members})
        cost = group.fan_in + sum(group.widths)
        most = (group.fan_in * sum(group.widths) - 1) // cost
        align = self.config.align if self.config.align is not None else (8 if uniform >= 64 else 1)
        align = align if uniform >= align else 1
        # the joint norm is the sum over the inputs: each of them is met once per token all the same
        spectrum = algebra.spectrum(group) / inputs
        return RankDemand(spectrum, cost, uniform, max(1, most // align * align), align)

    def _record(self, group: Candidate, rank: int, algebra: Algebra, norms: Norms) -> None:
        row = _record(group, algebra.factors(group, rank), len(self.groups), self.model, self.tensors)
        row["regularisation"] = sorted({algebra.metrics[layer.path].rung for layer in group.members})
        row["calibration_rows"] = norms.used(group.members)
        self.rows.append(row)
        self.groups.append({key: row[key] for key in ("members", "rank", "kind")})


def _nothing(left: list[Skipped], config: BasisSharingConfig) -> Outcome:
    """The model stays as it is, with a note why; an error where the recipe names layers."""
    reasons = "; ".join(f"{s.path or 'the model'}: {s.reason}" for s in left[:6]) or f"it has no {KINDS}"
    text = f"no layer of the model can be factorized ({reasons}{' ...' if len(left) > 6 else ''})"
    if config.layers.include or isinstance(config.rank, dict):
        raise StageError(f"basis_sharing: {text}: name other layers, lower min_width, or remove the stage")
    totals, _ = summary([])
    dense = [{"path": s.path, "reason": s.reason} for s in left]
    report = {**totals, "groups": [], "decisions": [], "dense": dense}
    return Outcome({"groups": [], "metrics": report, "notes": [f"{text}: the model is unchanged"]}, {})


def _record(
    group: Candidate, found: Factors, index: int, model: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, Json]:
    """Adds the factors of a group to `tensors`, in the layout and type of the layers, and returns its report row."""
    factors, members = balanced(found), group.members
    weight = model.get_submodule(members[0].path).get_parameter("weight")
    for j, (layer, c) in enumerate(zip(members, factors.coefficients, strict=True)):
        c = c if layer.kind == "linear" else c.T.reshape(-1, factors.rank, *(1 for _ in weight.shape[2:]))
        tensors[f"{index}.{j}"] = c.to("cpu", weight.dtype).contiguous()
    basis = factors.basis
    if members[0].kind != "linear":
        basis = basis.T.reshape(factors.rank, *weight.shape[1:])
    tensors[f"{index}.basis"] = basis.to("cpu", weight.dtype).contiguous()
    tensors[f"{index}.spectrum"] = factors.spectrum.cpu()
    return group_report(group, factors, weight.element_size())


def _kept(candidate: Candidate, config: BasisSharingConfig) -> Fraction:
    """Share of the weights of `candidate` that stays, from `ratio` or from a given rank."""
    rank = config.rank if isinstance(config.rank, int) else None
    for pattern, value in config.rank.items() if isinstance(config.rank, dict) else ():
        if rank is None and any(fnmatchcase(layer.path, pattern) for layer in candidate.members):
            rank = value
    if rank is None:
        return kept_share(config.ratio)
    total = sum(candidate.widths)
    return Fraction(rank * (candidate.fan_in + total), candidate.fan_in * total)


def _has_weight(model: nn.Module, layer: Layer) -> bool:
    weight = model.get_submodule(layer.path).get_parameter("weight")
    if not bool(torch.isfinite(weight).all()):
        raise StageError(f"basis_sharing: the weight of layer {layer.path!r} is not finite: train the model again")
    return bool(weight.any())


def matrix_of(model: nn.Module, layer: Layer) -> Tensor:
    """The weight as W [d_in, d_out]."""
    return model.get_submodule(layer.path).get_parameter("weight").detach().flatten(1).T


def calibration_rows(split: Split, config: BasisSharingConfig, context: Context) -> Tensor:
    """Which samples of the calibration split are used: a random choice, in order."""
    count = len(split) if config.calibration_samples is None else min(len(split), config.calibration_samples)
    return torch.randperm(len(split), generator=context.generator("calibration"))[:count].sort().values
