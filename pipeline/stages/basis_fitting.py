"""Bases and coefficients for a model's layers: from calibration data to tensors, which the stage then installs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..graph import KINDS, Layer, Skipped, discover
from ..stage import Context, Json
from ..task import Split, Task
from .basis_config import BasisSharingConfig
from .basis_solver import Budget, Solved, decision_report, factors_at, group_report, passes, solve, summary
from .factorization import Metric, balanced, kept_share
from .grouping import Candidate, candidates, select
from .norms import Calibration, Norms, collect
from .rank_allocation import RankDemand, allocate_ranks


@dataclass(frozen=True)
class Outcome:
    """JSON, and per group the tensors ``<group>.basis``, ``<group>.<member>`` and ``<group>.spectrum``."""

    data: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


def fit_factors(model: nn.Module, task: Task, config: BasisSharingConfig, context: Context) -> Outcome:
    """Chooses groups, ranks, bases and coefficients for `model`, which is not changed.

    Raises:
        StageError: see `fit` of the stage.
    """
    model.to(context.device).eval()
    split = task.splits["calibration"]
    calibration = Calibration(
        config.whitening,
        calibration_rows(split, config, context),
        config.calibration_batch,
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
    fitting = _Fitting(model, task, config, context, calibration)
    runs = list(passes(found, *calibration.matrices_kept))
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
        self, model: nn.Module, task: Task, config: BasisSharingConfig, context: Context, calibration: Calibration
    ) -> None:
        self.model, self.task, self.config, self.context = model, task, config, context
        self.calibration = calibration
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
        norms = collect(self.model, self.task, run, self.calibration, self.context)
        self._norms = norms if last else None
        for candidate in self.context.progress.track(run, "basis_sharing: groups"):
            matrices, metrics, roots = self._algebra(candidate, norms)
            config = self.config
            division, solved = solve(candidate, matrices, metrics, self.budget, config.share, config.refit, roots)
            self.decisions.append(decision_report(candidate, division, config.share))
            for part in solved:
                if part.factors is None:
                    self.dense += part.group.members
                elif config.ranks == "loss":
                    self._waiting.append((part.group, self._demand(part, metrics)))
                else:
                    self._record(part, metrics, norms)

    def allocate(self) -> None:
        """Spreads the budget over the groups that wait for a rank, and factorizes them."""
        if not self._waiting:
            return
        groups = [group for group, _ in self._waiting]
        demands = [demand for _, demand in self._waiting]
        budget = sum(int(self.budget.keep(group) * group.fan_in * sum(group.widths)) for group in groups)
        ranks = dict(
            zip(
                groups,
                allocate_ranks(demands, budget, self.config.rank_floor, self.config.spectrum_power),
                strict=True,
            )
        )
        for run in passes(groups, *self.calibration.matrices_kept):
            norms = self._norms or collect(self.model, self.task, run, self.calibration, self.context)
            for group in self.context.progress.track(run, "basis_sharing: ranks"):
                matrices, metrics, roots = self._algebra(group, norms)
                factors = factors_at(group, ranks[group], matrices, metrics, self.config.refit, roots)
                self._record(Solved(group, factors), metrics, norms)

    def _algebra(
        self, candidate: Candidate, norms: Norms
    ) -> tuple[dict[str, Tensor], dict[str, Metric], dict[str, Tensor] | None]:
        """Weights, norms of inputs and roots of outputs by path, in float64."""
        members = candidate.members
        matrices = {x.path: matrix_of(self.model, x).to(norms.device, torch.float64) for x in members}
        roots = norms.output_roots(members)
        by_path = None if roots is None else {x.path: root for x, root in zip(members, roots, strict=True)}
        return matrices, norms.metrics(members), by_path

    def _demand(self, part: Solved, metrics: Mapping[str, Metric]) -> RankDemand:
        group, factors = part.group, part.factors
        assert factors is not None
        inputs = len({id(metrics[layer.path]) for layer in group.members})
        cost = group.fan_in + sum(group.widths)
        most = (group.fan_in * sum(group.widths) - 1) // cost
        align = self.config.align if self.config.align is not None else (8 if factors.rank >= 64 else 1)
        # the joint norm is the sum over the inputs: each of them is met once per token all the same
        return RankDemand(factors.spectrum / inputs, cost, factors.rank, max(1, most // align * align), align)

    def _record(self, part: Solved, metrics: Mapping[str, Metric], norms: Norms) -> None:
        row = _record(part, len(self.groups), self.model, self.tensors)
        row["regularisation"] = sorted({metrics[layer.path].rung for layer in part.group.members})
        row["calibration_rows"] = norms.used(part.group.members)
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


def _record(part: Solved, index: int, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Json]:
    """Adds the factors of a group to `tensors`, in the layout and type of the layers, and returns its report row."""
    assert part.factors is not None
    factors, members = balanced(part.factors), part.group.members
    weight = model.get_submodule(members[0].path).get_parameter("weight")
    for j, (layer, c) in enumerate(zip(members, factors.coefficients, strict=True)):
        c = c if layer.kind == "linear" else c.T.reshape(-1, factors.rank, *(1 for _ in weight.shape[2:]))
        tensors[f"{index}.{j}"] = c.to("cpu", weight.dtype).contiguous()
    basis = factors.basis
    if members[0].kind != "linear":
        basis = basis.T.reshape(factors.rank, *weight.shape[1:])
    tensors[f"{index}.basis"] = basis.to("cpu", weight.dtype).contiguous()
    tensors[f"{index}.spectrum"] = factors.spectrum.cpu()
    return group_report(part.group, factors, weight.element_size())


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
