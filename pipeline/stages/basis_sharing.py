"""The `basis_sharing` stage: layers become a basis, shared where that pays, times private coefficients.

METHODS §3, arXiv 2410.03765. Which layers may share is read off the structure of the model (`pipeline/graph.py`):
readers of one tensor, layers of one role in neighbouring blocks, or both. No architecture is named anywhere.

If `max_drop` is set and the validation accuracy after the fine-tuning lies further below the accuracy before
the stage, the stage rolls back: it returns the model as it came, with an empty edit and a note.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear, SharedBasis

from ..errors import CheckpointError, StageError
from ..evaluation import evaluate
from ..graph import KINDS, Layer, Skipped, discover, replace_module
from ..metric import within
from ..stage import Context, Edit, Json, Stage, StageConfig, StageResult, State
from ..task import Batch, Split, SplitName, Task, split_of
from ..training import TrainingConfig, train_model
from .basis_solver import Budget, Solved, decision_report, group_report, passes, solve, summary
from .factorization import Metric, Refit, balanced, identity_metric, kept_share, metric_of
from .grouping import Candidate, GroupMode, candidates, check_patterns, select
from .second_moments import SecondMoment, collect_second_moments

Rank = Annotated[int, Field(ge=1)]


class LayerPatterns(StageConfig):
    """Which layers take part, by glob patterns over module paths (``*`` crosses dots)."""

    include: tuple[str, ...] = ()
    """Only these; none means every Linear, Conv1d and Conv2d. The layer that gives the logits and a convolutional stem
    take part only if their very path stands here."""
    exclude: tuple[str, ...] = ()
    """Never these."""


class BasisSharingConfig(StageConfig):
    """How to factorize."""

    ratio: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the weights removed from every factorized layer."""
    rank: Rank | dict[str, Rank] | None = None
    """In place of `ratio`: one rank for all groups, or ranks by glob pattern over member paths (the rest goes by
    `ratio`). If a group is cut because sharing does not pay, its parts get ranks of equal bytes in all."""
    ranks: Literal["uniform"] = "uniform"
    """How the budget is spread over groups: `ratio` applies to each alike."""
    groups: GroupMode = "readers_and_layers"
    """What may share a basis: nothing, neighbouring layers of one role, readers of one tensor, or both."""
    group_size: int = Field(default=2, ge=1)
    """Neighbouring layers per group."""
    share: Literal["auto", "always"] = "auto"
    """Share only where the error at equal bytes is smaller than apart, or always."""
    whitening: Literal["none", "input"] = "input"
    """Norm of the error: of the weights, or of the activations on calibration data (SVD-LLM)."""
    refit: Refit = "per_layer"
    """Coefficients from each layer's own inputs, or from the group's (the published method)."""
    align: int | None = Field(default=None, ge=1)
    """Ranks are rounded down to a multiple of this; default 1 below 64, else 8."""
    layers: LayerPatterns = LayerPatterns()
    """Which layers take part."""
    min_width: int = Field(default=8, ge=1)
    """Layers whose matrix has fewer rows or columns stay dense."""
    calibration_samples: int | None = Field(default=1024, ge=1)
    """Random samples of the calibration split that are used; None: all."""
    calibration_batch: int = Field(default=64, ge=1)
    """Samples per forward pass."""
    max_rows: int = Field(default=65536, ge=1)
    """Tokens or positions per layer that enter its second moment; beyond it a random share is taken."""
    finetune: TrainingConfig | None = None
    """Training of the factorized model; shared bases stay shared."""
    max_drop: float | None = Field(default=None, ge=0.0)
    """Accepted loss of validation accuracy; beyond it the stage rolls back."""


def check(model: nn.Module, task: Task, config: BasisSharingConfig) -> None:
    """Refuses patterns that match nothing in the base model, or only layers that cannot be factorized.

    Raises:
        RecipeError: names the pattern, and the nearest paths or the reasons.
    """
    ranks = list(config.rank) if isinstance(config.rank, dict) else []
    if config.layers.include or config.layers.exclude or ranks:
        split = split_of(task, "calibration", needed_by="basis_sharing")
        graph = discover(model, split.batch(range(min(2, len(split)))).inputs)
        check_patterns(graph, config.layers.include, config.layers.exclude, ranks, config.min_width)


@dataclass(frozen=True)
class _Outcome:
    """JSON, and per group the tensors ``<group>.basis``, ``<group>.<member>`` and ``<group>.spectrum``."""

    data: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


def fit(model: nn.Module, task: Task, config: BasisSharingConfig, context: Context) -> StageResult:
    """Factorizes layers of `model` in place, and fine-tunes if asked to.

    Raises:
        DataError: a split is missing.
        StageError: the recipe names layers and none can be factorized, a pattern matches nothing, or an input or
            weight is not finite.
    """
    split_of(task, "calibration", needed_by="basis_sharing")
    if config.finetune is not None:
        split_of(task, "train", needed_by="the fine-tuning of basis_sharing")
    original, before = None, 0.0
    if config.max_drop is not None:
        split_of(task, "validation", needed_by="max_drop of basis_sharing")
        original = copy.deepcopy(model)
        before = evaluate(model, task, "validation", context.device).value
    saved = context.load("factorized")
    if saved is None:
        outcome = _factorize(model, task, config, context)
        context.save("factorized", State(outcome.data, outcome.tensors))
    else:
        outcome = _Outcome(saved.data, saved.tensors)
    model = _install(model.to("cpu"), outcome)
    metrics: dict[str, Json] = dict(outcome.data["metrics"])
    notes: list[str] = list(outcome.data["notes"])
    if config.finetune is not None and outcome.data["groups"]:
        metrics["finetune"] = train_model(model, task, config.finetune, context, name="finetune")
    artifacts = {k: v for k, v in outcome.tensors.items() if k.endswith(".spectrum")}
    groups = outcome.data["groups"]
    if config.max_drop is not None and original is not None:
        after = evaluate(model, task, "validation", context.device).value
        metrics |= {"quality_before": before, "quality_after": after}
        if not within(task.metric, before, after, config.max_drop):
            model, groups = original, []
            metrics["rolled_back"] = True
            notes = [
                f"rolled back: validation {task.metric.name} fell from {before:.4f} to {after:.4f}, more than "
                f"max_drop {config.max_drop}; the model is unchanged: lower ratio, or allow (more) finetune epochs"
            ]
    edit = Edit("basis_sharing", {"groups": groups})
    return StageResult(model.to("cpu").eval(), edit, metrics, artifacts, tuple(notes))


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Puts factorized layers, all zeros, where `edit` says; members of a group hold one `SharedBasis` object.

    Args:
        model: as `fit` was given it.
        edit: ``{"groups": [{"members": [path, ...], "rank": k, "kind": "linear" | "conv1d" | "conv2d"}, ...]}``.

    Raises:
        CheckpointError: the model has no such layer.
    """
    for group in edit.data["groups"]:
        basis: SharedBasis | None = None
        for path in group["members"]:
            layer = _dense_layer(model, path, group["kind"])
            weight = layer.weight.detach()
            out, rank = weight.shape[0], group["rank"]
            bias = None if layer.bias is None else torch.zeros_like(layer.bias.detach())
            new: FactorizedLinear | FactorizedConv1d | FactorizedConv2d
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                basis = basis or SharedBasis(weight.new_zeros(rank, *weight.shape[1:]))
                coefficients = weight.new_zeros(out, rank, *(1 for _ in layer.kernel_size))
                factorized = FactorizedConv1d if isinstance(layer, nn.Conv1d) else FactorizedConv2d
                new = factorized(basis, coefficients, bias, layer.stride, layer.padding, layer.dilation)
            else:
                basis = basis or SharedBasis(weight.new_zeros(weight.shape[1], rank))
                new = FactorizedLinear(basis, weight.new_zeros(rank, out), bias)
            # PyTorch's fused paths (TransformerEncoderLayer) read `.weight` of their layers unless one has a hook
            new.register_forward_pre_hook(_keep_off_fused_paths)
            new.train(layer.training).requires_grad_(layer.weight.requires_grad)
            replace_module(model, path, new)
    return model


def _keep_off_fused_paths(_module: nn.Module, _inputs: Any) -> None:
    """Does nothing; its presence is what counts."""


def _dense_layer(model: nn.Module, path: str, kind: str) -> nn.Linear | nn.Conv1d | nn.Conv2d:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if isinstance(layer, nn.Linear) and kind == "linear":
        return layer
    if isinstance(layer, nn.Conv1d) and kind == "conv1d":
        return layer
    if isinstance(layer, nn.Conv2d) and kind == "conv2d":
        return layer
    there = "no such module" if layer is None else f"a {type(layer).__name__}"
    raise CheckpointError(
        f"the basis_sharing edit replaces the {kind} layer {path!r}, and the model has {there} there: the checkpoint "
        "belongs to another model or another version of it"
    )


def _install(model: nn.Module, outcome: _Outcome) -> nn.Module:
    """Rebuilds the structure and fills in the factors and the biases that were there."""
    groups = outcome.data["groups"]
    paths = [path for group in groups for path in group["members"]]
    biases = {path: dict(model.get_submodule(path).named_parameters()).get("bias") for path in paths}
    model = rebuild(model, Edit("basis_sharing", {"groups": groups}))
    with torch.no_grad():
        for i, group in enumerate(groups):
            for j, path in enumerate(group["members"]):
                layer = model.get_submodule(path)
                assert isinstance(layer, FactorizedLinear | FactorizedConv1d | FactorizedConv2d)
                layer.basis.weight.copy_(outcome.tensors[f"{i}.basis"])
                layer.coefficients.copy_(outcome.tensors[f"{i}.{j}"])
                bias = biases[path]
                if layer.bias is not None and bias is not None:
                    layer.bias.copy_(bias)
    return model


def _factorize(model: nn.Module, task: Task, config: BasisSharingConfig, context: Context) -> _Outcome:
    model.to(context.device).eval()
    chosen = _calibration_rows(task.splits["calibration"], config, context)
    graph = discover(model, task.splits["calibration"].batch(chosen[:2]).to(context.device).inputs)
    layers, left = select(graph, config.layers.include, config.layers.exclude, config.min_width)
    left += [Skipped(layer.path, "its weight is all zero") for layer in layers if not _has_weight(model, layer)]
    layers = [layer for layer in layers if _has_weight(model, layer)]
    if not layers:
        return _nothing(left, config)
    found = candidates(layers, config.groups, config.group_size)
    budget = Budget(lambda candidate: _kept(candidate, config), 1 if config.rank is not None else config.align)
    groups: list[Json] = []
    rows: list[dict[str, Json]] = []
    decisions: list[Json] = []
    tensors: dict[str, Tensor] = {}
    dense = [{"path": s.path, "reason": s.reason} for s in left]
    for run in passes(found):
        moments = _moments(model, run, task.splits["calibration"], chosen, config, context)
        for candidate in context.progress.track(run, "basis_sharing: groups"):
            metrics = _metrics(candidate, moments, context)
            matrices = {x.path: _matrix(model, x).to(_numeric(context), torch.float64) for x in candidate.members}
            division, solved = solve(candidate, matrices, metrics, budget, config.share, config.refit)
            decisions.append(decision_report(candidate, division, config.share))
            for part in solved:
                if part.factors is None:
                    reason = "no rank at this ratio saves weights"
                    dense += [{"path": layer.path, "reason": reason} for layer in part.group.members]
                    continue
                row = _record(part, len(groups), model, tensors)
                row["regularisation"] = sorted({metrics[layer.path].rung for layer in part.group.members})
                row["calibration_rows"] = [
                    {"used": m.rows, "seen": m.seen}
                    for m in (moments.get(x.input_key) for x in part.group.members)
                    if m
                ]
                rows.append(row)
                groups.append({key: row[key] for key in ("members", "rank", "kind")})
    totals, notes = summary(rows)
    report = {**totals, "groups": rows, "decisions": decisions, "dense": dense}
    return _Outcome({"groups": groups, "metrics": report, "notes": notes}, tensors)


def _nothing(left: list[Skipped], config: BasisSharingConfig) -> _Outcome:
    """The model stays as it is, with a note why; an error where the recipe names layers."""
    reasons = "; ".join(f"{s.path or 'the model'}: {s.reason}" for s in left[:6]) or f"it has no {KINDS}"
    text = f"no layer of the model can be factorized ({reasons}{' ...' if len(left) > 6 else ''})"
    if config.layers.include or isinstance(config.rank, dict):
        raise StageError(f"basis_sharing: {text}: name other layers, lower min_width, or remove the stage")
    totals, _ = summary([])
    dense = [{"path": s.path, "reason": s.reason} for s in left]
    report = {**totals, "groups": [], "decisions": [], "dense": dense}
    return _Outcome({"groups": [], "metrics": report, "notes": [f"{text}: the model is unchanged"]}, {})


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


def _matrix(model: nn.Module, layer: Layer) -> Tensor:
    """The weight as W [d_in, d_out]."""
    return model.get_submodule(layer.path).get_parameter("weight").detach().flatten(1).T


def _calibration_rows(split: Split, config: BasisSharingConfig, context: Context) -> Tensor:
    count = len(split) if config.calibration_samples is None else min(len(split), config.calibration_samples)
    return torch.randperm(len(split), generator=context.generator("calibration"))[:count].sort().values


def _moments(
    model: nn.Module,
    run: list[Candidate],
    split: Split,
    chosen: Tensor,
    config: BasisSharingConfig,
    context: Context,
) -> dict[object, SecondMoment]:
    """Second moments by `Layer.input_key`; none where the norm needs no data."""
    if config.whitening == "none":
        return {}
    first = {layer.input_key: layer for candidate in reversed(run) for layer in reversed(candidate.members)}
    parts = torch.split(chosen, config.calibration_batch)

    def batches() -> Iterator[Batch]:
        for part in context.progress.track(parts, "basis_sharing: calibration", len(parts)):
            yield split.batch(part)

    by_path = collect_second_moments(
        model,
        list(first.values()),
        batches(),
        len(chosen),
        config.max_rows,
        context.device,
        context.generator,
    )
    return {key: by_path[layer.path] for key, layer in first.items()}


def _metrics(candidate: Candidate, moments: Mapping[object, SecondMoment], context: Context) -> dict[str, Metric]:
    """The norm of every member, one object per different input."""
    device = _numeric(context)
    made: dict[object, Metric] = {}
    for layer in candidate.members:
        if layer.input_key not in made:
            moment = moments.get(layer.input_key)
            made[layer.input_key] = (
                identity_metric(layer.fan_in, device) if moment is None else metric_of(moment.matrix.to(device))
            )
    return {layer.path: made[layer.input_key] for layer in candidate.members}


def _numeric(context: Context) -> torch.device:
    """Where float64 algebra runs: not every accelerator has float64."""
    return context.device if context.device.type == "cuda" else torch.device("cpu")


def _splits(config: BasisSharingConfig) -> tuple[SplitName, ...]:
    return (
        "calibration",
        *(("train",) if config.finetune is not None else ()),
        *(("validation",) if config.max_drop is not None else ()),
    )


STAGE = Stage(
    name="basis_sharing",
    config=BasisSharingConfig,
    fit=fit,
    rebuild=rebuild,
    after={
        "class_aware_pruning": "a factorized layer has no filters to remove: put `class_aware_pruning` before it",
    },
    splits=("calibration", "train", "validation"),
    splits_for=_splits,
    check=check,
)
