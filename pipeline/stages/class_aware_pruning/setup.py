"""What a run starts from: the given model, opened and specialised, and what of it can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from edgewright.export.source import answers_of
from edgewright.models.sources.module_state import copied

from ...analysis.channels import surgery
from ...analysis.channels.finding import find_channels
from ...analysis.channels.groups import Channels
from ...analysis.channels.specialising import class_columns, class_cut
from ...analysis.cost import Cost, count
from ...analysis.opening import ATTENTION, NORMS, RECURRENT, close, open_layers
from ...errors import RecipeError, StageError
from ...metric import Score
from ...stage import Context
from ...task import Task, check_classes, names_of_classes, split_of
from ...tasks.class_subset import chosen_classes, restricted
from ...training.evaluation import evaluate
from .config import ClassAwarePruningConfig
from .criteria import CRITERIA
from .criterion import Criterion
from .target import MacTarget

NAME = "class_aware_pruning"


@dataclass(frozen=True)
class Setup:
    """What does not change during a run.

    Attributes:
        task: with the chosen classes only.
        inputs: one row.
        given: the model of all classes.
        opened: its attention layers, of which heads can be taken, and the LSTMs and GRUs of which units can.
        classes: what of `given` the chosen classes leave.
        base: that, the beginning of the iterations.
        channels: of `base`.
        dense: what `given` costs.
        target: in MACs.
        baseline: quality of `base` on the chosen classes.
        criterion: what scores the filters.
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
    target: MacTarget
    baseline: Score
    criterion: Criterion

    def target_with_streams(self) -> MacTarget:
        """`target` as it would be with `prune_residual`."""
        return with_streams(self.base, self.inputs, self.config, self.dense.macs)


def set_up(model: nn.Module, task: Task, config: ClassAwarePruningConfig, context: Context) -> Setup:
    """Looks at everything before anything is trained.

    Raises:
        RecipeError: see `check_kind`.
        DataError: a class without images for the scores.
        StageError: nothing can be pruned (with a reason per layer), or the target is out of reach.
    """
    check_kind(task, config)
    names, by = names_of_classes(task), f"stage {NAME!r}"
    chosen = chosen_classes(task, config.classes, asked_by=by) if config.classes else ()
    specialise = 0 < len(chosen) < len(names)
    task = restricted(task, config.classes, asked_by=by)
    if scores_each_class(config, task):
        check_classes(task, config.score_split, needed_by=f"stage {NAME!r}")
    model.to("cpu").eval()
    inputs = split_of(task, config.score_split, NAME).batch([0]).inputs
    opened = opened_for(model, inputs, config)
    classes = class_cut(model, inputs, chosen, class_columns(answers_of(task))) if specialise else {}
    base = surgery.pruned(model, classes) if classes else model
    channels = prunable(base, inputs, config)
    close_untouched(opened, channels, model, base)
    baseline = evaluate(base, task, "validation", context.device)
    base.to("cpu")
    dense = count(model, inputs)
    target = target_of(base, inputs, config, channels, dense.macs)
    target.check(lambda: with_streams(base, inputs, config, dense.macs))
    return Setup(
        task,
        config,
        context,
        inputs,
        model,
        list(opened),
        classes,
        base,
        channels,
        dense,
        target,
        baseline,
        criterion_of(config, task),
    )


def opened_for(model: nn.Module, inputs: tuple[Tensor, ...], config: ClassAwarePruningConfig) -> dict[str, nn.Module]:
    """Opens attention, LSTMs, GRUs and norms of its own of `model` in place; returns what stood there, by path."""
    opened: dict[str, nn.Module] = {}
    for kinds in (ATTENTION, RECURRENT, NORMS):
        opened |= open_layers(model, inputs, kinds, config.exclude)
    return opened


def close_untouched(opened: dict[str, nn.Module], channels: Channels, *models: nn.Module) -> None:
    """Puts LSTMs, GRUs and norms of which nothing can go back into the models, and takes them out of `opened`."""
    axes = {f"{axis[0]}." for group in channels.groups for axis in group.members}
    for path, module in list(opened.items()):
        if any(kind.can_open(module) for kind in (*RECURRENT, *NORMS)) and not any(
            axis.startswith(f"{path}.") for axis in axes
        ):
            del opened[path]
            for model in models:
                close(model, {path: copied(module)})


def criterion_of(config: ClassAwarePruningConfig, task: Task) -> Criterion:
    """The criterion that the recipe names, or what its `auto` is on this task."""
    return CRITERIA[config.criterion_name(names_of_classes(task))]


def scores_each_class(config: ClassAwarePruningConfig, task: Task) -> bool:
    """Whether every class needs samples: where there are classes, and filters are scored on samples at all.

    Of the classes that samples show, some may be so rare that a split shows none; the criteria that do not weigh
    classes against each other do without them.
    """
    criterion = criterion_of(config, task)
    if not task.labels:
        return criterion.needs_classes and bool(names_of_classes(task))
    return criterion.needs_statistics or config.needs_loss


def check_kind(task: Task, config: ClassAwarePruningConfig) -> None:
    """Refuses what only classes can answer on a task without classes.

    Raises:
        RecipeError: names the setting, and what does without.
    """
    if task.labels:
        return
    shown = names_of_classes(task)
    without = f"the task {task.name!r} has no classes"
    if CRITERIA[config.criterion_name(shown)].needs_classes and not shown:
        able = ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_classes)
        raise RecipeError(
            f"{NAME}.criterion is {config.criterion}, which weighs classes against each other, and {without}: choose "
            f"one that needs none ({able}), or leave it out, which then "
            f"is {ClassAwarePruningConfig().criterion_name(())}"
        )
    for field in (
        ("only_correct", "max_worst_class_drop") if shown else ("classes", "only_correct", "max_worst_class_drop")
    ):
        if getattr(config, field) == type(config).model_fields[field].default:
            continue
        if shown:
            without = f"a sample of the task {task.name!r} shows any number of them"
        raise RecipeError(
            f"{NAME}.{field} speaks of classes{' that rows are one of' if shown else ''}, and {without}: leave it out"
        )


def unprunable(refused: Mapping[str, str]) -> str:
    """One sentence with the reasons of the layers."""
    reasons = "".join(f"\n  {path}: {reason}" for path, reason in list(refused.items())[:8])
    more = f"\n  and {len(refused) - 8} more" if len(refused) > 8 else ""
    empty = ", it has no convolution or Linear"
    return f"no layer of this model can be pruned{':' if refused else empty}{reasons}{more}"


def target_of(
    base: nn.Module,
    inputs: tuple[Tensor, ...],
    config: ClassAwarePruningConfig,
    channels: Channels,
    dense_macs: int,
) -> MacTarget:
    """The target for `base`, of whose channels `channels` can go."""
    return MacTarget(config, channels, dense_macs, count(base, inputs).macs - channels.macs({}))


def with_streams(
    base: nn.Module, inputs: tuple[Tensor, ...], config: ClassAwarePruningConfig, dense_macs: int
) -> MacTarget:
    """The target as it would be with `prune_residual`."""
    wider = config.model_copy(update={"prune_residual": True})
    return target_of(base, inputs, wider, prunable(base, inputs, wider), dense_macs)


def prunable(model: nn.Module, inputs: tuple[Tensor, ...], config: ClassAwarePruningConfig) -> Channels:
    """The channels of `model` that can go, without those that the recipe excludes.

    Raises:
        StageError: there are none, although the recipe asks for a share of the MACs or excludes layers.
    """
    channels = find_channels(model, inputs, config.prune_residual)
    groups, refused = [], dict(channels.refused)
    for group in channels.groups:
        named = [path for path in group.producers if any(fnmatchcase(path, pattern) for pattern in config.exclude)]
        if named:
            refused.update(dict.fromkeys(group.producers, f"excluded by the recipe ({named[0]})"))
        else:
            groups.append(group)
    if not groups and (config.exclude or isinstance(config.target_mac_reduction, float)):
        raise StageError(f"{NAME}: {unprunable(refused)}\nRemove the stage, or change what the reasons name")
    return replace(channels, groups=tuple(groups), refused=refused)
