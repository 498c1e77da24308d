"""The loop of class-aware pruning: score, prune, retrain, judge; resumable after every epoch (METHODS §1.4, §1.6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...analysis.channels import surgery
from ...analysis.channels.apart import EndedError, in_a_process
from ...analysis.channels.equivalence import failures
from ...analysis.channels.groups import Channels
from ...analysis.opening import reopen
from ...metric import Score
from ...stage import Context, Edit, Stage, StageResult
from ...task import SplitName, Task
from ...training.evaluation import evaluate
from ...training.training import TrainingConfig, train_model
from . import iterations
from .candidates import choose, moments_of
from .config import ClassAwarePruningConfig
from .floors import broken_floor
from .iterations import Progress
from .loss import modified_loss
from .outcome import iteration_row, result_of
from .preview import preview
from .report import report
from .setup import NAME, Setup, check_kind, scores_each_class, set_up, unprunable
from .similarity import handed_over


def fit(model: nn.Module, task: Task, config: ClassAwarePruningConfig, context: Context) -> StageResult:
    """Prunes `model` iteratively; every finished iteration is saved.

    Raises:
        DataError: a class without images for the scores.
        StageError: nothing can be pruned (with a reason per layer), the target is out of reach, or training diverges.
    """
    setup = set_up(model, task, config, context)
    progress = iterations.load(setup) or _beginning(setup)
    while progress.stopped is None:
        _iterate(setup, progress)
        iterations.save(setup, progress)
    quality = _finetune(setup, progress)
    return result_of(setup, progress, quality)


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """Narrows `model` as `edit` says.

    Raises:
        CheckpointError: the edit was made for another model.
    """
    reopen(model, edit.data.get("opened", ()))
    surgery.prune(model, surgery.from_json(edit.data["keep"]), edit.data["attributes"])
    return model


def check(model: nn.Module, task: Task, config: ClassAwarePruningConfig) -> None:
    """Refuses, before any compute, what only classes can answer on a task without classes.

    Raises:
        RecipeError: see `check_kind`.
    """
    del model
    check_kind(task, config)


def _beginning(setup: Setup) -> Progress:
    if not setup.channels.groups:
        return Progress(setup.base, {}, stopped=unprunable(setup.channels.refused))
    if setup.config.prepare is not None:
        _train(setup, setup.base, setup.config.prepare, "prepare")
    return Progress(setup.base, {group.name: torch.arange(group.units) for group in setup.channels.groups})


def _iterate(setup: Setup, progress: Progress) -> None:
    """One iteration; changes `progress`."""
    number = progress.iterations + 1
    channels = setup.channels.narrowed(progress.kept)
    selection = choose(setup, progress, channels, number)
    kept_now = {name: _without(channels, name, units) for name, units in selection.removed.items()}
    wrong = _tried(setup, progress.model, channels, kept_now)
    for name, reason in wrong.items():
        progress.notes.append(f"iteration {number}: {name} was left as it is: {reason}")
        del kept_now[name]
    if not kept_now:
        progress.stopped = "no candidates" if not selection.removed else "no candidate can be removed"
        return
    given = progress.model
    if setup.config.hand_over:
        going = [group for group in channels.groups if group.name in kept_now]
        given = handed_over(given, channels, kept_now, moments_of(setup, given, going))
    candidate = surgery.pruned(given, channels.keep(kept_now))
    _train(setup, candidate, setup.config.retrain, f"retrain-{number}")
    quality = evaluate(candidate, setup.task, "validation", setup.context.device)
    candidate.to("cpu")
    broken = broken_floor(setup.task, setup.baseline, quality, setup.config)
    good = broken is None
    progress.log.append(iteration_row(setup, number, candidate, quality, selection, channels, kept_now, good))
    last = progress.log[-1]
    setup.context.progress.say(
        f"iteration {number}: validation {setup.task.metric.name} {quality.value:.4f}, MACs {last['macs']:,}"
        + ("" if good else f" (undone: {broken})")
    )
    if broken is not None:
        progress.stopped = broken
        return
    progress.model = candidate
    progress.kept = {
        name: units[kept_now[name]] if name in kept_now else units for name, units in progress.kept.items()
    }
    if setup.target.reached(channels.narrowed(kept_now).macs({})):
        progress.stopped = "target reached"
    elif number >= setup.config.max_iterations:
        progress.stopped = "max_iterations"


def _tried(setup: Setup, model: nn.Module, channels: Channels, kept: dict[str, Tensor]) -> dict[str, str]:
    """Groups that cannot be cut so, with the reason."""
    if not channels.foreign or not kept:
        return failures(model, setup.inputs, channels.keep, kept)
    try:
        return in_a_process(model, lambda: failures(model, setup.inputs, channels.keep, kept))
    except EndedError as ended:
        return dict.fromkeys(kept, f"compiled code of another library {ended.how} with so many channels")


def _without(channels: Channels, name: str, units: Tensor) -> Tensor:
    group = next(g for g in channels.groups if g.name == name)
    stays = torch.ones(group.units, dtype=torch.bool)
    stays[units] = False
    return stays.nonzero().flatten()


def _train(setup: Setup, model: nn.Module, training: TrainingConfig, name: str) -> None:
    config = setup.config
    loss = modified_loss(setup.task, training, config.lambda1, config.lambda_o, config.orthogonality_padding)
    train_model(model, setup.task, training, setup.context, name, loss)


def _finetune(setup: Setup, progress: Progress) -> Score:
    """Trains the last good model with the plain loss and keeps the result unless it got worse; its quality."""
    before = evaluate(progress.model, setup.task, "validation", setup.context.device)
    progress.model.to("cpu")
    if setup.config.finetune is None:
        return before
    weights = {key: value.clone() for key, value in progress.model.state_dict().items()}
    train_model(progress.model, setup.task, setup.config.finetune, setup.context, "finetune")
    after = evaluate(progress.model, setup.task, "validation", setup.context.device)
    progress.model.to("cpu")
    broken = broken_floor(setup.task, setup.baseline, after, setup.config)
    if setup.task.metric.drop(before.value, after.value) <= 0.0 and broken is None:
        return after
    progress.model.load_state_dict(weights)
    progress.notes.append(
        f"fine-tuning took validation {setup.task.metric.name} from {before.value:.4f} to {after.value:.4f} and was "
        f"undone{f' ({broken})' if broken else ''}: lower finetune.learning_rate"
    )
    return before


def _splits(config: ClassAwarePruningConfig) -> tuple[SplitName, ...]:
    return ("train", "validation") if config.score_split == "train" else ("train", "calibration", "validation")


def _classes_alone(config: ClassAwarePruningConfig) -> ClassAwarePruningConfig:
    """Keeps the classes of `config`; no filter scores below a threshold of 0, so all of them stay."""
    return ClassAwarePruningConfig(
        classes=config.classes, criterion="l1", target_mac_reduction=None, mode="threshold_only", threshold_frac=0.0
    )


STAGE = Stage(
    name=NAME,
    config=ClassAwarePruningConfig,
    fit=fit,
    rebuild=rebuild,
    splits=("train", "calibration", "validation"),
    splits_for=_splits,
    per_class=scores_each_class,
    check=check,
    classes=lambda config: config.classes,
    classes_alone=_classes_alone,
    tolerances=("max_drop",),
    report=report,
    preview=preview,
)
