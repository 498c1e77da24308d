"""The loop of class-aware pruning: score, prune, retrain, judge; resumable after every epoch (METHODS §1.4, §1.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...class_subset import ClassSubset, class_indices
from ...cost import Cost, count
from ...errors import StageError
from ...evaluation import evaluate
from ...metric import Score
from ...stage import Context, Edit, Json, Stage, StageResult, State
from ...task import SplitName, Task, check_classes, split_of
from ...training import TrainingConfig, train_model
from . import surgery
from .attention import open_attention, reopen
from .config import ClassAwarePruningConfig
from .criteria import CRITERIA, filter_scores, unit_scores
from .equivalence import failures
from .floors import broken_floor
from .groups import Channels, find_channels
from .loss import modified_loss
from .scores import FilterStatistics, collect
from .selection import Selection, select, smallest_macs
from .specialising import class_cut

NAME = "class_aware_pruning"


@dataclass
class _Work:
    """What does not change during a run.

    Attributes:
        task: with the chosen classes only.
        inputs: one row.
        given: the model of all classes.
        opened: its attention layers of which heads can be taken.
        classes: what of `given` the chosen classes leave.
        base: that, the beginning of the iterations.
        channels: of `base`.
        dense: what `given` costs.
        fixed: MACs of `base` outside the layers that `channels` counts.
        baseline: quality of `base` on the chosen classes.
    """

    task: Task
    config: ClassAwarePruningConfig
    context: Context
    inputs: tuple[Tensor, ...]
    given: nn.Module
    opened: list[str]
    classes: surgery.Keep
    base: nn.Module
    channels: Channels
    dense: Cost
    fixed: int
    baseline: Score

    @property
    def original(self) -> dict[str, int]:
        return {group.name: group.units for group in self.channels.groups}

    @property
    def mac_limit(self) -> int | None:
        """MACs of the layers that the target leaves; the rest of the model keeps its own."""
        share = self.config.target
        if share is None:
            return None
        limit = self._limit(1.0 - share)
        return limit if self.config.target_mac_reduction != "auto" else max(limit, self.least)

    @cached_property
    def least(self) -> int:
        """MACs of the layers at their smallest widths."""
        return smallest_macs(self.channels, self.original, self.config)

    def next_limit(self, macs: int) -> int | None:
        """`mac_limit`, or with `target_steps` the first of the steps to it that layers of so many MACs do not meet."""
        share, steps = self.config.target, self.config.target_steps
        if share is None or steps is None:
            return self.mac_limit
        limits = [self._limit((1.0 - share) ** (step / steps)) for step in range(1, steps + 1)]
        return next((limit for limit in limits if limit < macs), limits[-1])

    def _limit(self, share: float) -> int:
        return int(share * self.dense.macs) - self.fixed


@dataclass
class _Progress:
    """The last good iteration.

    Attributes:
        model: its weights.
        kept: per group the units of the original that are left.
        log: one row per iteration, the one that was undone included.
        stopped: why the loop ended; None while it goes on.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    log: list[dict[str, Json]] = field(default_factory=list)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)
    artifacts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        return len(self.log)


def fit(model: nn.Module, task: Task, config: ClassAwarePruningConfig, context: Context) -> StageResult:
    """Prunes `model` iteratively; every finished iteration is saved.

    Raises:
        DataError: a class without images for the scores.
        StageError: nothing can be pruned (with a reason per layer), the target is out of reach, or training diverges.
    """
    chosen = class_indices(task.labels, config.classes, asked_by=f"stage {NAME!r}") if config.classes else ()
    specialise = 0 < len(chosen) < len(task.labels)
    task = ClassSubset(task, chosen) if specialise else task
    check_classes(task, config.score_split, needed_by=f"stage {NAME!r}")
    model.to("cpu").eval()
    inputs = split_of(task, config.score_split, NAME).batch([0]).inputs
    opened = open_attention(model, inputs, config.exclude)
    classes = class_cut(model, inputs, chosen) if specialise else {}
    base = surgery.pruned(model, classes) if classes else model
    channels = _prunable(base, inputs, config)
    baseline = evaluate(base, task, "validation", context.device)
    base.to("cpu")
    fixed = count(base, inputs).macs - channels.macs({})
    dense = count(model, inputs)
    work = _Work(task, config, context, inputs, model, opened, classes, base, channels, dense, fixed, baseline)
    _check_target(work)
    progress = _resume(work) if channels.groups else _Progress(base, {}, stopped=_unprunable(channels.refused))
    while progress.stopped is None:
        _iterate(work, progress)
        _save(work, progress)
    quality = _finetune(work, progress)
    return _result(work, progress, quality)


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Narrows `model` as `edit` says.

    Raises:
        CheckpointError: the edit was made for another model.
    """
    reopen(model, edit.data.get("opened", ()))
    surgery.prune(model, surgery.from_json(edit.data["keep"]), edit.data["attributes"])
    return model


def _prunable(model: nn.Module, inputs: tuple[Tensor, ...], config: ClassAwarePruningConfig) -> Channels:
    channels = find_channels(model, inputs, config.prune_residual)
    groups, refused = [], dict(channels.refused)
    for group in channels.groups:
        named = [path for path in group.producers if any(fnmatchcase(path, pattern) for pattern in config.exclude)]
        if named:
            refused.update(dict.fromkeys(group.producers, f"excluded by the recipe ({named[0]})"))
        else:
            groups.append(group)
    if not groups and (config.exclude or isinstance(config.target_mac_reduction, float)):
        raise StageError(f"{NAME}: {_unprunable(refused)}\nRemove the stage, or change what the reasons name")
    return replace(channels, groups=tuple(groups), refused=refused)


def _unprunable(refused: Mapping[str, str]) -> str:
    reasons = "".join(f"\n  {path}: {reason}" for path, reason in list(refused.items())[:8])
    more = f"\n  and {len(refused) - 8} more" if len(refused) > 8 else ""
    empty = ", it has no convolution or Linear"
    return f"no layer of this model can be pruned{':' if refused else empty}{reasons}{more}"


def _check_target(work: _Work) -> None:
    limit = work.mac_limit
    if limit is None:
        return
    if work.least > limit:
        reachable = 1.0 - (work.fixed + work.least) / work.dense.macs
        raise StageError(
            f"{NAME}: target_mac_reduction {work.config.target_mac_reduction} cannot be reached: with min_width "
            f"{work.config.min_width} and round_to {work.config.round_to} at most {reachable:.3f} of the MACs go: "
            f"lower these or the target, or set prune_residual (now {work.config.prune_residual})"
        )


def _resume(work: _Work) -> _Progress:
    state = work.context.load("iteration")
    if state is None:
        if work.config.prepare is not None:
            _train(work, work.base, work.config.prepare, "prepare")
        return _Progress(work.base, {g.name: torch.arange(g.units) for g in work.channels.groups})
    kept = {name: _from_runs(runs) for name, runs in state.data["kept"].items()}
    model = surgery.pruned(work.base, work.channels.keep(kept))
    weights = {key.removeprefix("model."): value for key, value in state.tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    artifacts = {key.removeprefix("artifact."): v for key, v in state.tensors.items() if key.startswith("artifact.")}
    data = state.data
    return _Progress(model, kept, list(data["log"]), data["stopped"], list(data["notes"]), artifacts)


def _save(work: _Work, progress: _Progress) -> None:
    tensors = {f"model.{key}": value for key, value in progress.model.state_dict().items()}
    tensors.update({f"artifact.{key}": value for key, value in progress.artifacts.items()})
    runs = surgery.to_json({"": progress.kept})[""]
    data = {"kept": runs, "log": progress.log, "stopped": progress.stopped, "notes": progress.notes}
    work.context.save("iteration", State(data, tensors))


def _from_runs(runs: Json) -> Tensor:
    return surgery.from_json({"": {"": runs}})[""][""]


def _iterate(work: _Work, progress: _Progress) -> None:
    """One iteration; changes `progress`."""
    number = progress.iterations + 1
    channels = work.channels.narrowed(progress.kept)
    selection = _choose(work, progress, channels, number)
    kept_now = {name: _without(channels, name, units) for name, units in selection.removed.items()}
    wrong = failures(progress.model, work.inputs, channels.keep, kept_now)
    for name, reason in wrong.items():
        progress.notes.append(f"iteration {number}: {name} was left as it is: {reason}")
        del kept_now[name]
    if not kept_now:
        progress.stopped = "no candidates" if not selection.removed else "no candidate can be removed"
        return
    candidate = surgery.pruned(progress.model, channels.keep(kept_now))
    _train(work, candidate, work.config.retrain, f"retrain-{number}")
    quality = evaluate(candidate, work.task, "validation", work.context.device)
    candidate.to("cpu")
    broken = broken_floor(work.task, work.baseline, quality, work.config)
    good = broken is None
    after = channels.narrowed(kept_now)
    progress.log.append(_row(work, number, candidate, quality, selection, after, kept_now, channels, good))
    last = progress.log[-1]
    work.context.progress.say(
        f"iteration {number}: validation {work.task.metric.name} {quality.value:.4f}, MACs {last['macs']:,}"
        + ("" if good else f" (undone: {broken})")
    )
    if broken is not None:
        progress.stopped = broken
        return
    progress.model = candidate
    progress.kept = {
        name: units[kept_now[name]] if name in kept_now else units for name, units in progress.kept.items()
    }
    if work.mac_limit is not None and after.macs({}) <= work.mac_limit:
        progress.stopped = "target reached"
    elif number >= work.config.max_iterations:
        progress.stopped = "max_iterations"


def _choose(work: _Work, progress: _Progress, channels: Channels, number: int) -> Selection:
    config, context, criterion = work.config, work.context, CRITERIA[work.config.criterion_name]
    layers = list(dict.fromkeys(path for group in channels.groups for path in group.producers))
    statistics: dict[str, FilterStatistics] = {}
    if criterion.needs_statistics or config.needs_loss:
        split = split_of(work.task, config.score_split, NAME)
        statistics = collect(progress.model, layers, split, work.task.labels, config.scoring(), context)
    scores = filter_scores(criterion, progress.model, statistics, channels.groups, context, number)
    units = {g.name: unit_scores(g, scores, statistics, progress.model) for g in channels.groups}
    progress.artifacts = {f"scores.{path}": score.to(torch.float32) for path, score in scores.items()}
    for path, found in statistics.items():
        progress.artifacts[f"class_count.{path}"] = found.class_count
        progress.artifacts[f"class_counts.{path}"] = found.per_class
    if criterion.needs_statistics and number == 1:
        _note_thresholds(work, progress, statistics)
    full_scale = criterion.full_scale(len(work.task.labels))
    return select(channels, units, work.original, full_scale, work.next_limit(channels.macs({})), config)


def _note_thresholds(work: _Work, progress: _Progress, statistics: Mapping[str, FilterStatistics]) -> None:
    """Says where class counts rest on a relative `tau`, and where they say nothing."""
    relative = [path for path, found in statistics.items() if found.relative_tau is not None]
    if relative and work.config.tau_mode == "auto":
        progress.notes.append(
            f"{len(relative)} of {len(statistics)} layers, {relative[0]!r} first, are never exactly 0 (no ReLU behind "
            f"them): a filter counts there above {statistics[relative[0]].relative_tau} times the layer's mean"
        )
    full = sum(int((s.class_count >= len(work.task.labels)).sum()) for s in statistics.values())
    total = sum(len(s.class_count) for s in statistics.values())
    if full > 0.98 * total:
        progress.notes.append(
            f"{full} of {total} filters count for every class, so class counts say nothing: use tau_mode: relative "
            "with a larger tau (0.3, 1.0)"
        )


def _without(channels: Channels, name: str, units: Tensor) -> Tensor:
    group = next(g for g in channels.groups if g.name == name)
    stays = torch.ones(group.units, dtype=torch.bool)
    stays[units] = False
    return stays.nonzero().flatten()


def _row(
    work: _Work,
    number: int,
    model: nn.Module,
    quality: Score,
    selection: Selection,
    after: Channels,
    kept_now: Mapping[str, Tensor],
    before: Channels,
    good: bool,
) -> dict[str, Json]:
    cost = count(model, work.inputs)
    removed = {g.name: g.units - len(kept_now[g.name]) for g in before.groups if g.name in kept_now}
    return {
        "iteration": number,
        "kept": good,
        "accuracy": quality.accuracy,
        "worst_class_accuracy": quality.worst_class_accuracy,
        "macs": cost.macs,
        "mac_reduction": 1.0 - cost.macs / work.dense.macs,
        "parameters": cost.parameters,
        "threshold": selection.threshold,
        "candidates": selection.candidates,
        "cap": selection.cap,
        "removed": removed,
        "filters": {path: after.widths[(path, "out")] for g in after.groups for path in g.producers},
    }


def _train(work: _Work, model: nn.Module, training: TrainingConfig, name: str) -> None:
    config = work.config
    loss = modified_loss(work.task, training, config.lambda1, config.lambda_o, config.orthogonality_padding)
    train_model(model, work.task, training, work.context, name, loss)


def _finetune(work: _Work, progress: _Progress) -> Score:
    """Trains the last good model with the plain loss and keeps the result unless it got worse; its quality."""
    before = evaluate(progress.model, work.task, "validation", work.context.device)
    progress.model.to("cpu")
    if work.config.finetune is None:
        return before
    weights = {key: value.clone() for key, value in progress.model.state_dict().items()}
    train_model(progress.model, work.task, work.config.finetune, work.context, "finetune")
    after = evaluate(progress.model, work.task, "validation", work.context.device)
    progress.model.to("cpu")
    broken = broken_floor(work.task, work.baseline, after, work.config)
    if work.task.metric.drop(before.value, after.value) <= 0.0 and broken is None:
        return after
    progress.model.load_state_dict(weights)
    progress.notes.append(
        f"fine-tuning took validation {work.task.metric.name} from {before.value:.4f} to {after.value:.4f} and was "
        f"undone{f' ({broken})' if broken else ''}: lower finetune.learning_rate"
    )
    return before


def _result(work: _Work, progress: _Progress, quality: Score) -> StageResult:
    narrowed = work.channels.keep(progress.kept)
    keep = surgery.compose(work.classes, narrowed)
    attributes = surgery.changed_attributes(work.given, keep)
    cost = count(progress.model, work.inputs)
    notes = list(progress.notes)
    target = work.config.target
    reduction = 1.0 - cost.macs / work.dense.macs
    if work.classes:
        notes.append(
            f"from here on the task has {len(work.task.labels)} classes ({', '.join(work.task.labels)}): this and "
            "later steps are judged on their samples only"
        )
    if not narrowed:
        notes.append(f"nothing was removed, so MACs and parameters stay: {progress.stopped}")
    elif target is not None and progress.stopped == "target reached" and reduction < target - 0.005:
        notes.append(
            f"{reduction:.3f} of the MACs went, not {target:g}: min_width {work.config.min_width:g} allows no more of "
            "the layers that can be pruned; prune_residual adds the streams of residual networks"
        )
    elif target is not None and progress.stopped != "target reached":
        notes.append(f"target_mac_reduction {target:g} was not reached ({reduction:.3f}): {progress.stopped}")
    elif target is not None and reduction > target + 0.005:
        notes.append(
            f"target_mac_reduction {target} was passed ({reduction:.3f}): widths go in steps, here of round_to "
            f"{work.config.round_to}, and of whole groups where convolutions are grouped"
        )
    metrics: dict[str, Any] = {
        "criterion": work.config.criterion_name,
        "mode": work.config.mode if target is None else f"target ({work.config.allocation})",
        "stopped": progress.stopped,
        "classes": list(work.task.labels) if work.classes else None,
        "baseline_accuracy": work.baseline.accuracy,
        "baseline_worst_class_accuracy": work.baseline.worst_class_accuracy,
        "accuracy": quality.accuracy,
        "worst_class_accuracy": quality.worst_class_accuracy,
        "macs_before": work.dense.macs,
        "macs": cost.macs,
        "mac_reduction": reduction,
        "parameters_before": work.dense.parameters,
        "parameters": cost.parameters,
        "iterations": progress.log,
        "not_pruned": dict(work.channels.refused),
    }
    data: dict[str, Json] = {"keep": surgery.to_json(keep), "attributes": attributes}
    if work.opened:
        data["opened"] = work.opened
    edit = Edit(NAME, data)
    return StageResult(progress.model.to("cpu").eval(), edit, metrics, progress.artifacts, tuple(notes))


def _splits(config: ClassAwarePruningConfig) -> tuple[SplitName, ...]:
    return ("train", "validation") if config.score_split == "train" else ("train", "calibration", "validation")


STAGE = Stage(
    name=NAME,
    config=ClassAwarePruningConfig,
    fit=fit,
    rebuild=rebuild,
    splits=("train", "calibration", "validation"),
    splits_for=_splits,
    per_class=True,
    classes=lambda config: config.classes,
)
