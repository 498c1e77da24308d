"""The configuration of class-aware pruning."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.targets.target import target_named, target_names

from ...stage import StageConfig
from ...training.training import TrainingConfig
from .criteria import CRITERIA
from .scores import ScoringSettings

CPU_STEP = 8
"""Channels that ONNX Runtime's blocked convolutions hold at least: 8 with AVX2 and NEON, 16 with AVX-512."""

_PROFILES: dict[str, tuple[int, int]] = {
    "cpu": (CPU_STEP, 2 * CPU_STEP),
    # tensor cores take 8 float16 channels, and 32 of INT8
    "tensorrt": (8, 32),
}
"""Multiples by name beside those of the targets: of narrow layers, and of wide ones."""

_AUTO_TARGET = 0.5
_WITHOUT_CLASSES = "taylor"
"""Of the criteria that need no classes the one nearest to the default: both weigh what a filter changes in the loss."""


def _known_criterion(name: str) -> str:
    if name != "auto" and name not in CRITERIA:
        close = difflib.get_close_matches(name, CRITERIA, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown criterion {name!r}{hint} There are: auto, {', '.join(CRITERIA)}")
    return name


CriterionName = Annotated[
    str, AfterValidator(_known_criterion), WithJsonSchema({"type": "string", "enum": ["auto", *CRITERIA]})
]
"""`auto`, or a name of `CRITERIA`."""


def _multiples(profile: str) -> tuple[int, int]:
    """Of narrow and of wide layers.

    Raises:
        ValueError: neither a profile nor a target has this name.
    """
    if profile in _PROFILES:
        return _PROFILES[profile]
    try:
        target = target_named(profile)
    except InputError as error:
        raise ValueError(f"{error}, and {', '.join(_PROFILES)}") from None
    return target.narrow_channel_alignment, target.channel_alignment


def _check_multiple(value: int | str | None) -> int | str | None:
    if isinstance(value, str):
        if value.isdigit():
            return _check_multiple(int(value))
        _multiples(value)
    elif value is not None and value < 1:
        raise ValueError(f"{value} is no multiple: give 1 or more")
    return value


Multiple = Annotated[
    int | str | None,
    AfterValidator(_check_multiple),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [*_PROFILES, *target_names()]},
                {"type": "integer", "minimum": 1},
                {"type": "null"},
            ]
        }
    ),
]
"""A number of channels, or the name of a target or of a profile that many targets share."""


class ClassAwarePruningConfig(StageConfig):
    """Score, prune, retrain, and again, until nothing qualifies, a target is reached or accuracy would fall too far."""

    criterion: CriterionName = "auto"
    """Which filters matter; see `criteria`. `auto`: `class_coverage_fpgm` with a target, and `class_count`, as
    published, without; `taylor` for a task without classes."""
    hand_over: bool = False
    """Before a channel goes, add its weights in the layers that read it to those of the surviving channel whose feature
    maps are most like its own, times the regression coefficient (METHODS §6); with any criterion."""
    target_mac_reduction: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["auto"] | None = "auto"
    """Share of the model's MACs to remove, and to stop at. Then `allocation` says how many filters go from which layer
    and the criterion only which; there is no threshold. `auto`: half of them, or what widths and floors allow, nothing
    on a model without prunable layers; a number that is out of reach is refused. null, as published: remove what is
    below the threshold, wherever it is."""
    target_steps: int | None = Field(default=None, ge=1)
    """Iterations in which a target is reached, each by the same ratio, instead of by `max_frac_per_iter`."""
    allocation: Literal["equal_share", "loss_per_mac"] = "equal_share"
    """With a target: the same share of every layer's original filters, or the smallest Fisher loss per MAC saved."""
    mode: Literal["threshold_only", "percent_only", "both"] = "both"
    """Which limits hold in one iteration: the threshold, the share `max_frac_per_iter`, or both. With a target there is
    no threshold, and `threshold_only` means that one iteration goes all the way."""
    threshold_frac: float = Field(default=0.3, ge=0.0)
    """Filters that score below this share of the criterion's scale may go: of the number of classes for `class_count`,
    of the layer's average filter for the others."""
    max_frac_per_iter: float = Field(default=0.10, gt=0.0, le=1.0)
    """Largest share of the remaining prunable filters that one iteration removes."""
    min_width: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of its original filters that every layer keeps; never less than 4 filters and 2 %."""
    round_to: Multiple = None
    """Widths after pruning are multiples of this, rounded up; layers that are not pruned keep their width. A profile
    names two multiples: `cpu` 8, and 16 for layers of 64 filters and more; `tensorrt` 8, and 32 for layers of 128
    filters and more; a target (`x86`, `x86_vnni`) has its own alignment. None: any width."""
    prune_residual: bool = False
    """Also narrow the streams of residual networks, whose filters several layers add up."""
    classes: tuple[str | int, ...] = ()
    """Specialise the network to these classes of the task (names, or indices from 0; () for all): only their outputs
    are left, in the order of the task's labels, and only they are scored, trained and judged, here and from here on."""
    exclude: tuple[str, ...] = ()
    """Layers that keep their filters: module paths, with ``*`` and ``?``."""
    score_split: Literal["train", "calibration"] = "calibration"
    """Where the images for the scores come from; they are never augmented."""
    images_per_class: int = Field(default=10, ge=1)
    """Images per class for the scores, or as many as there are; ten times as many in all without classes. An image that
    shows several classes is one of each, and counts there with that class's part of the loss."""
    score_batch_size: int = Field(default=64, ge=1)
    """Images per forward and backward pass of scoring; does not change the scores."""
    agg: Literal["sum_then_max", "max_then_sum"] = "sum_then_max"
    """Class count at the position where most classes need the filter, or with each class at its own best position."""
    tau: float = Field(default=0.0, ge=0.0)
    """A filter counts at a position if |activation * gradient| exceeds this."""
    tau_mode: Literal["auto", "absolute", "relative"] = "auto"
    """`relative`: `tau` times the sample's mean over the layer. `auto`: relative for layers whose outputs are never
    exactly without effect, as behind SiLU and GELU (with 0.3 if `tau` is 0), absolute for the others."""
    only_correct: bool = False
    """Count only images that the model classifies correctly; for tasks whose rows are of one class."""
    lambda1: float = Field(default=1e-4, ge=0.0)
    """Weight of the L1 norm of all parameters in `prepare` and `retrain`."""
    lambda_o: float = Field(default=1e-2, ge=0.0)
    """Weight of the orthogonality of 3x3 filters in `prepare` and `retrain`."""
    orthogonality_padding: int = Field(default=1, ge=0)
    """1 as released; 2 counts every overlap of two 3x3 filters."""
    prepare: TrainingConfig | None = None
    """Training with the modified loss before the first scoring; None if the model has had it."""
    retrain: TrainingConfig = TrainingConfig(epochs=5, learning_rate=0.01)
    """Training with the modified loss after each pruning step."""
    finetune: TrainingConfig | None = None
    """Training at the end with the task's loss alone."""
    max_drop: float = Field(default=0.01, ge=0.0, le=1.0)
    """Validation accuracy may fall by this (0.01 is one point) below the given model's; an iteration that falls further
    is undone and is the last."""
    max_worst_class_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """The same limit for the worst class' validation accuracy, where each row is of one class; None sets none."""
    max_iterations: int = Field(default=50, ge=1)
    """Iterations at most."""

    def scoring(self) -> ScoringSettings:
        """The fields that concern scores."""
        return ScoringSettings(
            self.images_per_class, self.score_batch_size, self.agg, self.tau, self.tau_mode, self.only_correct
        )

    def multiple(self, filters: int) -> int:
        """What the width of a layer with so many filters before pruning is rounded up to."""
        if not isinstance(self.round_to, str):
            return self.round_to or 1
        fine, coarse = _multiples(self.round_to)
        # a layer of fewer than four coarse steps would have next to no choice left
        return coarse if filters >= 4 * coarse else fine

    def criterion_name(self, classes: Sequence[str]) -> str:
        """The criterion that `auto` stands for on a task with these classes, or the one that was named."""
        if self.criterion != "auto":
            return self.criterion
        if not classes:
            return _WITHOUT_CLASSES
        return "class_count" if self.target is None else "class_coverage_fpgm"

    @property
    def target(self) -> float | None:
        """`target_mac_reduction` as a number; None without a target."""
        return _AUTO_TARGET if self.target_mac_reduction == "auto" else self.target_mac_reduction

    @property
    def needs_loss(self) -> bool:
        """Whether the allocation asks for the Fisher loss, whatever the criterion."""
        return self.target is not None and self.allocation == "loss_per_mac"
