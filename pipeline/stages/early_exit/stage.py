"""The `early_exit` stage: heads inside a trained classifier, and thresholds that say who may leave where.

METHODS §2 (class exclusion, arXiv 2309.13443) and §7.1 (confidence). The stage chooses places, trains the
heads (with the network or alone), and finds several validated settings of the thresholds on the validation
split.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.classes import CLASSES
from edgewright.edge_runtime.bundle.manifest import OperatingPoint
from edgewright.edge_runtime.measure.paired import standard_errors
from edgewright.export.accounts.exit_costs import exit_macs
from edgewright.export.options import ExportOptions
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

from ...errors import RecipeError, StageError
from ...metric import Answer, Score, within
from ...quality_drop import measured_drop
from ...stage import Context, Edit, Json, Requirement, Stage, StageResult
from ...task import Split, Task, batches, check_classes, split_of
from .analysis import analyse_logits
from .automatic_places import boundaries, choose_subset
from .config import DEFAULT_SHARES, EarlyExitConfig
from .placement import Place, choose_places
from .preview import preview
from .report import report
from .thresholds.limits import ExitSearchConfig
from .thresholds.search import OperatingPointResult, default_limits, search_thresholds
from .training import train_heads, train_jointly

__all__ = ["STAGE", "EarlyExitConfig", "collect_logits", "fit", "rebuild"]

_TRIAL_EPOCHS = 10


def fit(model: nn.Module, task: Task, config: EarlyExitConfig, context: Context) -> StageResult:
    """Adds exits to `model`, trains them and finds thresholds.

    Args:
        model: a classifier, called positionally with the task's inputs, that returns logits [N, C].
        task: its train split trains, its validation split chooses.
        config: see `EarlyExitConfig`.
        context: see `Context`.

    Returns:
        A `MultiExit`; `model` itself where no exit can sit anywhere and no place was named. The edit holds what
        `rebuild` needs, the validated operating points (the first is what the thresholds are set to) and the limits,
        for a search on other logits later.

    Raises:
        RecipeError: a place that does not exist.
        StageError: a place no exit can sit at, outputs that do not fit the task, or training that diverges.
        DataError: a class without samples.
    """
    check_classes(task, "train", needed_by="early_exit")
    validation = split_of(task, "validation", needed_by="early_exit")
    inputs = validation.batch([0]).inputs
    classes = len(task.labels)
    _check_output(model, inputs, classes)
    chosen, placement = _places(model, task, config, context)
    if not chosen:
        return StageResult(model.eval(), Edit("early_exit", {"heads": []}), notes=(_nowhere(model),))
    dims = [len(place.shape) for place in chosen]
    network = _with_heads(model, chosen, task, config, context)
    log, given_accuracy, notes = _train(network, task, config, context)

    logits = collect_logits(network, validation, context.device)
    macs = exit_macs(network, task, "validation")
    before = macs[-1] - sum(_head_macs(network))
    began = time.perf_counter()
    points = search_thresholds(network, logits, validation.targets, macs, config, context.generator("search"))
    tried, seconds = sum(len(point.trials) for point in points), time.perf_counter() - began
    context.progress.say(f"thresholds: {tried} settings tried in {seconds:.1f} s, {tried / seconds:.0f} a second")
    network.thresholds.copy_(torch.tensor(points[0].thresholds, dtype=torch.float32))
    metrics = _metrics(network, task, logits, validation.targets, points, macs, before, given_accuracy, log)
    if placement is not None:
        metrics["placement"] = placement
        notes += _fewer(config, len(chosen), len(placement["candidates"]))
    notes += _summary(network, points[0], metrics, before, config)
    data = {
        "policy": config.policy,
        "classes": classes,
        "heads": [_spec_json(s, d) for s, d in zip(network.specs, dims, strict=True)],
        "operating_points": [point.to_json() for point in points],
        "search": config.model_dump(mode="json", include=set(ExitSearchConfig.model_fields)),
    }
    artifacts = {f"trials.{point.name}": point.trials for point in points}
    return StageResult(network, Edit("early_exit", data), metrics, artifacts, notes)


def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
    """A `MultiExit` around `model`; state keys ``base.*``, ``heads.<i>.linear.*``, ``thresholds``.

    `model` itself where the stage found no place for an exit.
    """
    heads = edit.data["heads"]
    if not heads:
        return model.eval()
    known = {field.name for field in dataclasses.fields(HeadSpec)}
    specs = [HeadSpec(**{key: value for key, value in head.items() if key in known}) for head in heads]
    network = MultiExit(model, specs, [h["dims"] for h in heads], edit.data["classes"], edit.data["policy"])
    return network.eval()


def check(model: nn.Module, task: Task, config: EarlyExitConfig) -> None:
    """Refuses places in `at` that the base model does not have, or where no exit can sit, and an unknown `mask`.

    Raises:
        RecipeError: names the place and the nearest ones that can carry an exit, or the inputs that there are.
    """
    _mask_of(task, config)
    if not config.at:
        return
    inputs = split_of(task, "validation", needed_by="early_exit").batch([0]).inputs
    try:
        for place in choose_places(model, inputs, config.at, ()):
            place.head(config.pool, token=0 if config.head == "token" else None)
    except StageError as error:
        raise RecipeError(str(error)) from error


def _places(
    model: nn.Module, task: Task, config: EarlyExitConfig, context: Context
) -> tuple[list[Place], dict[str, Json] | None]:
    """Where the exits go, in order of depth; with `auto`, how that was found too."""
    validation = split_of(task, "validation", needed_by="early_exit")
    inputs = validation.batch([0]).inputs
    tokens = config.head == "token"
    if config.auto is None:
        return choose_places(model, inputs, config.at, config.at_macs or DEFAULT_SHARES, tokens), None
    several = validation.batch(range(min(16, len(validation)))).inputs
    candidates = [place for place in boundaries(model, several) if place.tokens is not None or not tokens]
    if not candidates:
        return [], None
    network = _with_heads(model, candidates, task, config, context)
    trial = config.model_copy(update={"head_epochs": config.head_epochs or _TRIAL_EPOCHS})
    train_heads(network, task, trial, context, augment=False, name="trial heads")
    logits = collect_logits(network, validation, context.device)
    heads = _head_macs(network)
    passed = [*accumulate(heads), sum(heads)]
    macs = [whole - part for whole, part in zip(exit_macs(network, task, "validation"), passed, strict=True)]
    found = choose_subset(
        network.policy, logits, validation.targets, macs, heads, config.auto, lambda e: default_limits(e, config)
    )
    context.progress.say(
        f"places: {len(candidates)} candidates, {found.tried} sets tried, a mean row costs "
        f"{found.mean_cost:.1%} of the network at {', '.join(candidates[i].path for i in found.chosen)}"
    )
    told = {"candidates": [place.path for place in candidates], **dataclasses.asdict(found)}
    return [candidates[i] for i in found.chosen], told


def _head_macs(network: MultiExit) -> list[int]:
    return [network.head(i).macs for i in range(len(network.specs))]


def _with_heads(
    model: nn.Module, chosen: Sequence[Place], task: Task, config: EarlyExitConfig, context: Context
) -> MultiExit:
    """`model` with fresh heads at the places, in eval mode."""
    token = 0 if config.head == "token" else None
    mask = _mask_of(task, config)
    specs = [place.head(config.pool, token, mask, config.hidden) for place in chosen]
    dims = [len(place.shape) for place in chosen]
    network = MultiExit(model, specs, dims, len(task.labels), config.policy)
    _initialise(network, context.generator("heads"))
    return network.eval()


def _mask_of(task: Task, config: EarlyExitConfig) -> tuple[int, int] | None:
    """Index of the input that is the mask, and for how many tokens."""
    if config.mask is None:
        return None
    names = list(task.input_names)
    if config.mask not in names:
        raise RecipeError(
            f"early_exit.mask: the task {task.name!r} has no input {config.mask!r}; "
            f"it has {', '.join(map(repr, names))}"
        )
    index = names.index(config.mask)
    mask = split_of(task, "validation", needed_by="early_exit").batch([0]).inputs[index]
    if mask.dim() != 2:
        raise RecipeError(f"early_exit.mask: the input {config.mask!r} has {mask.dim()} axes, a mask has 2, [N, T]")
    return index, mask.shape[1]


def _fewer(config: EarlyExitConfig, found: int, candidates: int) -> tuple[str, ...]:
    """Why `auto` has placed fewer exits than it may."""
    if config.auto is None or found >= config.auto:
        return ()
    why = "there are no more places" if found == candidates else "no validation row would take another one"
    return (f"auto may place {config.auto} exits and placed {found}: {why}",)


def _nowhere(model: nn.Module) -> str:
    return (
        f"no exit was added and {type(model).__name__} is unchanged: none of its modules returns one float tensor with "
        "2 to 4 axes, batch first, between the first and the last layer with weights; split its forward into "
        "submodules, or leave the stage out"
    )


@torch.no_grad()
def collect_logits(model: MultiExit, split: Split, device: torch.device | None = None, size: int = 256) -> list[Tensor]:
    """Logits of every head on a split: K + 1 tensors float [len(split), C], on the CPU; the model ends there too."""
    device = torch.device("cpu") if device is None else device
    model.to(device).eval()
    parts = [[x.cpu() for x in model.all_logits(*b.to(device).inputs)] for b in batches(split, size)]
    model.to("cpu")
    return [torch.cat(heads) for heads in zip(*parts, strict=True)]


def _check_output(model: nn.Module, inputs: tuple[Tensor, ...], classes: int) -> None:
    model.eval()
    with torch.no_grad():
        output = model(*inputs)
    kind = type(model).__name__
    if not isinstance(output, Tensor):
        raise StageError(
            f"{kind} returns a {type(output).__name__}; early_exit needs a model that returns logits [N, C] as one "
            "tensor: wrap it in a module that returns only those"
        )
    if output.dim() != 2 or output.shape[1] != classes:
        raise StageError(
            f"{kind} returns {list(output.shape)} for {len(inputs[0])} row(s) and the task has {classes} labels: "
            "the number of logits must be the number of labels"
        )


def _initialise(model: MultiExit, generator: torch.Generator) -> None:
    """As `nn.Linear` does, from the context's randomness."""
    for i in range(len(model.specs)):
        for layer in model.head(i).layers:
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _end(task: Task, logits: Sequence[Tensor], targets: Tensor) -> Score:
    """Quality of the network's own end, all exits closed."""
    return task.metric.score([Answer(logits[-1], targets)])


def _train(
    model: MultiExit, task: Task, config: EarlyExitConfig, context: Context
) -> tuple[dict[str, Json], float, tuple[str, ...]]:
    """Trains as configured; returns the log, the accuracy of the network as it was given, and notes."""
    validation = split_of(task, "validation", needed_by="early_exit")
    given = _end(task, collect_logits(model, validation, context.device), validation.targets)
    log: dict[str, Json] = {}
    if config.freeze_backbone or config.head_epochs:
        log["heads"] = train_heads(model, task, config, context, augment=config.freeze_backbone)
    if config.freeze_backbone:
        return log, given.value, ("the network itself is unchanged, the heads alone were trained",)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        log["joint"] = train_jointly(model, task, config, context)
    except StageError as error:
        if not config.head_epochs:
            raise
        damage: str | None = str(error)
    else:
        damage = _damage(model, task, given, config, context)
    if damage is None or not config.head_epochs:
        return log, given.value, ()
    model.load_state_dict(kept)
    model.to("cpu").eval()
    return (
        log,
        given.value,
        (
            f"{damage}; joint training was undone and the heads trained alone are kept: set freeze_backbone, or lower "
            "training.learning_rate",
        ),
    )


def _damage(model: MultiExit, task: Task, given: Score, config: EarlyExitConfig, context: Context) -> str | None:
    """What joint training has broken, or None."""
    validation = split_of(task, "validation", needed_by="early_exit")
    logits = collect_logits(model, validation, context.device)
    if not all(torch.isfinite(x).all() for x in logits):
        return "joint training left logits that are not finite"
    after = _end(task, logits, validation.targets)
    if config.max_backbone_drop is None or within(task.metric, given.value, after.value, config.max_backbone_drop):
        return None
    return (
        f"joint training took the network's own validation {task.metric.name} from {given.value:.4f} to "
        f"{after.value:.4f}{measured_drop(task.metric, given, after)}, more than max_backbone_drop allows"
    )


def _spec_json(spec: HeadSpec, dims: int) -> dict[str, Json]:
    return {**dataclasses.asdict(spec), "dims": dims}


def _metrics(
    model: MultiExit,
    task: Task,
    logits: Sequence[Tensor],
    targets: Tensor,
    points: Sequence[OperatingPointResult],
    macs: Sequence[int],
    before: int,
    given_accuracy: float,
    log: dict[str, Json],
) -> dict[str, Json]:
    plain = _end(task, logits, targets)
    return {
        "min_share_met": {point.name: point.min_share_met for point in points},
        "exits": [spec.at for spec in model.specs],
        "exit_macs": list(macs),
        "plain_macs": before,
        "given_accuracy": given_accuracy,
        "plain_accuracy": plain.accuracy,
        "plain_worst_class_accuracy": plain.worst_class_accuracy,
        "validation": dataclasses.asdict(analyse_logits(model, logits, targets)),
        "log": log,
    }


def _summary(
    model: MultiExit,
    point: OperatingPointResult,
    metrics: dict[str, Json],
    before: int,
    config: EarlyExitConfig,
) -> tuple[str, ...]:
    added, had = (sum(p.numel() for p in part.parameters()) for part in (model.heads, model.base))
    mean = point.metrics["mean_macs"]
    notes = [
        f"{len(model.specs)} heads add {added} parameters ({added / max(1, had):.2%}); the mean row "
        f"costs {mean:.0f} MACs on the validation split, {mean / before:.1%} of the network without exits",
    ]
    change, error = point.metrics["accuracy"] - metrics["plain_accuracy"], point.metrics["accuracy_error"]
    if config.confidence is None and standard_errors(0.95) * error > config.tolerance:
        notes.append(
            f"{point.name}: accuracy changes by {change:+.2%} on the validation rows, which the thresholds were chosen "
            f"on; the standard error is {error:.2%}, too large to hold other rows to the tolerance of "
            f"{config.tolerance:.2%}: use more of them, or confidence: 0.95, which keeps a margin"
        )
    if model.policy.one_against_rest:
        notes.append(f"the loss of the exits was weighted in the mode {config.exit_loss_mode!r}")
    unused = [model.specs[i].at for i in range(len(model.specs)) if not point.metrics[f"exit_share_{i}"]]
    if unused:
        notes.append(
            f"no validation row leaves at {', '.join(unused)}: its head costs without saving; "
            "remove it, raise tolerance or ask for min_share"
        )
    missed = [name for name, met in metrics["min_share_met"].items() if met is False]
    if missed:
        notes.append(
            f"no thresholds within the tolerance give every exit {config.min_share:.1%} of the rows at "
            f"{', '.join(missed)}; the share was given up there"
        )
    return tuple(notes)


def check_export(config: EarlyExitConfig, options: ExportOptions) -> None:
    """Refuses options under which rows cannot leave.

    Raises:
        RecipeError: a batch that runs every row to the end, or a generator.
    """
    del config
    if options.batch == "dynamic":
        raise RecipeError(
            "export.batch is `dynamic`: every row would run to the end, which exits are to save; set it to "
            "`single` (or `auto`) for one row a run, to `compact` for any number, or leave the early_exit stage out"
        )
    if options.generator:
        raise RecipeError("export.generator: a generator has no exits: leave the stage early_exit out")


def operating_points(edit: Edit) -> list[OperatingPoint]:
    """The settings that were validated, the default first."""
    return [
        OperatingPoint(
            point["name"],
            tuple(point["thresholds"]),
            {name: value for name, value in point["metrics"].items() if value is not None},
        )
        for point in edit.data.get("operating_points", ())
    ]


def _idle_exits(report: Mapping[str, Json]) -> list[str]:
    """What ``require.every_exit`` misses."""
    tables = [section["data"]["table"] for section in report["sections"] if section["stage"] == "early_exit"]
    if not tables:
        return ["the model has no exits"]
    return [f"no test row leaves at exit {row['name']!r}" for row in tables[-1] if row["share"] == 0]


STAGE = Stage(
    answers=frozenset({CLASSES}),
    name="early_exit",
    config=EarlyExitConfig,
    fit=fit,
    rebuild=rebuild,
    after={
        "train": "a network with exits answers decisions, not logits to train on; early_exit trains the network and "
        "its heads itself, so put `train` before it",
        "class_aware_pruning": "heads read channels that pruning removes: put `class_aware_pruning` before it",
        "basis_sharing": "exits are trained, and their thresholds found, on the weights they run with; put "
        "basis_sharing before early_exit",
    },
    forbids={"early_exit": "the network has exits already; give all places to one early_exit stage"},
    splits=("train", "validation"),
    per_class=True,
    check=check,
    trains=lambda config: {} if config.freeze_backbone else {"training": config.training},
    check_export=check_export,
    preview=preview,
    tolerances=("tolerance", "max_backbone_drop"),
    branches=True,
    operating_points=operating_points,
    requirements={"every_exit": Requirement("Every exit is taken by at least one test row.", _idle_exits)},
    report=report,
)
