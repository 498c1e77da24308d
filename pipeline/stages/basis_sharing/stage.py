"""The `basis_sharing` stage: layers become a basis, shared where that pays, times private coefficients.

METHODS §3, arXiv 2410.03765. Which layers may share is read off the structure of the model (`analysis/layers.py`):
readers of one tensor, layers of one role in neighbouring blocks, or both. No architecture is named anywhere.

If `max_drop` is set and the validation accuracy after the fine-tuning lies further below the accuracy before
the stage, the stage rolls back: it returns the model as it came, with an empty edit and a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgewright.edge_runtime.answers.table import kind_of
from edgewright.export.source import Answering, answers_of
from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear, SharedBasis
from edgewright.models.sources.module_state import copied

from ...analysis.layers import discover, replace_module
from ...analysis.opening import RECURRENT, close, in_recurrent, open_layers, reopen
from ...errors import CheckpointError, RecipeError
from ...metric import Score, within
from ...quality_drop import measured_drop
from ...stage import Context, Edit, ExpectedMacs, Json, Requirement, Stage, StageResult, State
from ...task import SplitName, Task, split_of
from ...training.evaluation import evaluate
from ...training.training import train_model
from .config import BasisSharingConfig, LayerPatterns
from .fitting import Outcome, fit_factors
from .grouping import check_patterns
from .preview import preview
from .recovery import check_packages, recover
from .recurrent import with_opened
from .updates import updated

__all__ = ["STAGE", "BasisSharingConfig", "LayerPatterns", "check", "fit", "install", "rebuild"]


def check(model: nn.Module, task: Task, config: BasisSharingConfig) -> None:
    """Refuses patterns that match nothing in the base model, or only layers that cannot be factorized.

    Raises:
        RecipeError: names the pattern, and the nearest paths or the reasons; or labels are to be drawn where the task
            has no labels to draw.
        StageError: a package that the recovery needs is not installed.
    """
    if config.recovery is not None:
        check_packages(config.recovery)
    drawn = config.gradient_labels == "sampled" and config.whitening in ("fisher", "two_sided")
    if drawn and not _can_be_drawn(task):
        raise RecipeError(
            f"basis_sharing.gradient_labels is sampled, and the targets of the task {task.name!r} are no classes "
            "that could be drawn from a softmax: set it to data"
        )
    ranks = list(config.rank) if isinstance(config.rank, dict) else []
    if config.layers.include or config.layers.exclude or ranks:
        split = split_of(task, "calibration", needed_by="basis_sharing")
        rows, model = split.batch(range(min(2, len(split)))).inputs, copied(model)
        open_layers(model, rows, RECURRENT)
        graph = discover(model, rows)
        check_patterns(graph, config.layers.include, config.layers.exclude, ranks, config.min_width)


def _can_be_drawn(task: Task) -> bool:
    """Whether targets can be drawn from a softmax of what the model answers."""
    if isinstance(task, Answering):
        specs = answers_of(task)
        return len(specs) == 1 and kind_of(specs[0]).one_is_right
    targets = split_of(task, "calibration", needed_by="basis_sharing").batch([0]).targets
    return not targets.is_floating_point()


def fit(model: nn.Module, task: Task, config: BasisSharingConfig, context: Context) -> StageResult:
    """Factorizes layers of `model` in place, and fine-tunes if asked to.

    Raises:
        DataError: a split is missing.
        StageError: the recipe names layers and none can be factorized, a pattern matches nothing, or an input or
            weight is not finite.
    """
    split_of(task, "calibration", needed_by="basis_sharing")
    for key in ("recovery", "finetune"):
        if getattr(config, key) is not None:
            split_of(task, "train", needed_by=f"{key} of basis_sharing")
    taught = config.recovery is not None and config.recovery.distillation > 0.0
    original = copied(model) if taught or config.max_drop is not None else None
    before: Score | None = None
    if config.max_drop is not None:
        split_of(task, "validation", needed_by="max_drop of basis_sharing")
        before = evaluate(model, task, "validation", context.device)
    saved = context.load("factorized")
    model.to("cpu").eval()
    closed = open_layers(model, split_of(task, "calibration", needed_by="basis_sharing").batch([0]).inputs, RECURRENT)
    if saved is None:
        outcome = with_opened(fit_factors(model, task, config, context), closed)
        if config.updates and outcome.data["groups"]:
            compressed = install(copied(model), outcome)
            outcome = updated(model, compressed, outcome, task, config, context)
        context.save("factorized", State(outcome.data, outcome.tensors))
    else:
        outcome = Outcome(saved.data, saved.tensors)
    model = install(model.to("cpu"), outcome)
    close(model, {path: module for path, module in closed.items() if path not in outcome.data.get("opened", ())})
    metrics: dict[str, Json] = dict(outcome.data["metrics"])
    notes: list[str] = list(outcome.data["notes"])
    if config.recovery is not None and outcome.data["groups"]:
        metrics["recovery"] = recover(model, original, task, config.recovery, context)
    if config.finetune is not None and outcome.data["groups"]:
        metrics["finetune"] = train_model(model, task, config.finetune, context, name="finetune")
    artifacts = {k: v for k, v in outcome.tensors.items() if k.endswith(".spectrum")}
    groups, opened = outcome.data["groups"], outcome.data.get("opened", [])
    if config.max_drop is not None and original is not None and before is not None:
        after = evaluate(model, task, "validation", context.device)
        metrics |= {"quality_before": before.value, "quality_after": after.value}
        if not within(task.metric, before.value, after.value, config.max_drop):
            model, groups, opened = original, [], []
            metrics["rolled_back"] = True
            fell = measured_drop(task.metric, before, after)
            notes = [
                f"rolled back: validation {task.metric.name} fell from {before.value:.4f} to {after.value:.4f}{fell}, "
                f"more than max_drop {config.max_drop}; the model is unchanged: lower ratio, or allow (more) finetune "
                "epochs"
            ]
    edit = Edit("basis_sharing", {"groups": groups} | ({"opened": opened} if opened else {}))
    return StageResult(model.to("cpu").eval(), edit, metrics, artifacts, tuple(notes))


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Puts factorized layers, all zeros, where `edit` says; members of a group hold one `SharedBasis` object.

    Args:
        model: as `fit` was given it.
        edit: ``{"groups": [{"members": [path, ...], "rank": k, "kind": "linear" | "conv1d" | "conv2d"}, ...]}``, and
            under ``opened`` the paths of LSTMs and GRUs, if there are any.

    Raises:
        CheckpointError: the model has no such layer.
    """
    reopen(model, edit.data.get("opened", ()))
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
            if not in_recurrent(model, path):
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


def install(model: nn.Module, outcome: Outcome) -> nn.Module:
    """Puts the factors of `outcome` into `model`, in place; biases stay."""
    groups = outcome.data["groups"]
    paths = [path for group in groups for path in group["members"]]
    reopen(model, outcome.data.get("opened", ()))
    biases = {path: dict(model.get_submodule(path).named_parameters()).get("bias") for path in paths}
    model = rebuild(model, Edit("basis_sharing", {"groups": groups, "opened": outcome.data.get("opened", [])}))
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


def _splits(config: BasisSharingConfig) -> tuple[SplitName, ...]:
    return (
        "calibration",
        *(("train",) if config.finetune is not None or config.recovery is not None else ()),
        *(("validation",) if config.max_drop is not None else ()),
    )


def _merged_macs(metrics: Mapping[str, Json], macs: float) -> ExpectedMacs | None:
    """What reads one tensor multiplies a shared basis once in the graph, and each for itself in PyTorch."""
    merged = metrics.get("macs_after", 0) - metrics.get("macs_after_merged", 0)
    return ExpectedMacs(macs - merged, "it multiplies a basis once for all that read one tensor") if merged else None


def _nothing_shared(report: Mapping[str, Json]) -> list[str]:
    """What ``require.shared_basis`` misses."""
    return [] if report["ledger"]["shared"] else ["no basis is shared by at least two layers in the exported file"]


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
    preview=preview,
    tolerances=("max_drop",),
    expected_macs=_merged_macs,
    requirements={
        "shared_basis": Requirement(
            "At least one basis is shared by two layers or more in the exported file.", _nothing_shared
        )
    },
)
