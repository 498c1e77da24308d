"""What a recipe can say to the `basis_sharing` stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...analysis.output_gradients import Labels
from ...stage import StageConfig
from ...training.training import TrainingConfig
from .factorization import Refit
from .grouping import GroupMode
from .norms import Whitening
from .recovery import RecoveryConfig

Rank = Annotated[int, Field(ge=1)]


class LayerPatterns(StageConfig):
    """Which layers take part, by glob patterns over module paths (``*`` crosses dots)."""

    include: tuple[str, ...] = ()
    """Only these; none means every Linear, Conv1d and Conv2d. The layer that gives the logits and a convolutional stem
    take part only if their very path stands here."""
    exclude: tuple[str, ...] = ()
    """Never these."""
    private: tuple[str, ...] = ()
    """These take part, but share a basis with nobody."""


class BasisSharingConfig(StageConfig):
    """How to factorize."""

    ratio: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the weights removed from every factorized layer; 0 leaves the model as it is."""
    rank: Rank | dict[str, Rank] | None = None
    """In place of `ratio`: one rank for all groups, or ranks by glob pattern over member paths (the rest goes by
    `ratio`). If a group is cut because sharing does not pay, its parts get ranks of equal bytes in all."""
    ranks: Literal["uniform", "loss"] = "uniform"
    """How the budget is spread over groups: `ratio` applies to each alike, or every byte goes where it saves most loss
    (needs `whitening: two_sided`, whose errors are in one unit)."""
    rank_floor: float = Field(default=0.3, ge=0.0, le=1.0)
    """With `ranks: loss`: no group falls below this share of its uniform rank."""
    spectrum_power: float = Field(default=1.0, gt=0.0, le=1.0)
    """With `ranks: loss`: exponent of what a rank saves; below 1 the bytes that it costs count for more."""
    groups: GroupMode = "readers_and_layers"
    """What may share a basis: nothing, neighbouring layers of one role, readers of one tensor, or both."""
    group_size: int = Field(default=2, ge=1)
    """Neighbouring layers per group."""
    share: Literal["auto", "always"] = "auto"
    """Share only where the error at equal bytes is smaller than apart, or always."""
    whitening: Whitening = "input"
    """Norm of the error: of the weights (`none`), of the weights with inputs scaled by their magnitude
    (`activation_scale`, ASVD) or by the Fisher information (`fisher`, FWSVD), of the activations (`input`, SVD-LLM), or
    of the loss: activations on one side, gradients on the other (`two_sided`)."""
    scale_exponent: float = Field(default=0.5, gt=0.0, le=1.0)
    """With `activation_scale`: exponent of the mean magnitude."""
    gradient_labels: Labels = "data"
    """With `fisher` and `two_sided`: the loss's targets are the data's, or drawn from the model's own prediction."""
    refit: Refit = "per_layer"
    """Coefficients from each layer's own inputs, or from those of its group together (the published method); of
    `updates` as well."""
    updates: int = Field(default=0, ge=0)
    """Coefficients are fitted once more to the inputs that the compressed model itself gives: in so many passes, each
    over the next part of the layers, so that later ones see the earlier ones updated. 0: never, 1: all at once. On a
    language model it helped at 20 % and did harm at 50 %: compare."""
    update_target: Literal["outputs", "weights"] = "outputs"
    """What an update fits: the outputs of the model as it was, or its weights on the new inputs (as published, with
    `refit: group`)."""
    align: int | None = Field(default=None, ge=1)
    """Ranks of at least this are rounded down to a multiple of it; default 1 below 64, else 8."""
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
    recovery: RecoveryConfig | None = None
    """Training of the factors alone, or of adapters on them, with the dense model as a teacher; before `finetune`."""
    max_drop: float | None = Field(default=None, ge=0.0)
    """Accepted loss of validation accuracy; beyond it the stage rolls back."""

    @model_validator(mode="after")
    def _loss_needs_gradients(self) -> BasisSharingConfig:
        if self.ranks == "loss" and self.whitening != "two_sided":
            raise ValueError("ranks: loss compares groups in units of loss: it needs whitening: two_sided")
        if self.ranks == "loss" and self.rank is not None:
            raise ValueError("ranks: loss chooses the ranks from ratio: leave rank out")
        return self
