"""What a recipe says of exits: where they sit, what heads they have, how they decide, learn and are tuned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from edgewright.models.layers.exit_policies import policy_named

from .thresholds.limits import ExitSearchConfig
from .training import ExitTrainingConfig

DEFAULT_SHARES = (0.25, 0.5, 0.75)
"""Of the network's MACs: where exits go if the recipe names no places."""


class EarlyExitConfig(ExitTrainingConfig, ExitSearchConfig):
    """Where exits sit, how they decide, how they are trained, and what they may cost."""

    at: tuple[str, ...] = ()
    """Module paths whose outputs the exits read (`edgewright cuts` lists them); empty: `at_macs` or `auto` chooses."""
    at_macs: tuple[float, ...] | None = None
    """Shares of the network's MACs; an exit goes to the outermost module near each. Without `at` and `auto`: 0.25, 0.5
    and 0.75."""
    auto: int | None = Field(default=None, ge=1, le=16)
    """At most so many exits, where they save most on the validation split: heads are tried between all blocks, and an
    exit that no validation row would take is left out."""
    head: Literal["pooled", "token"] = "pooled"
    """What a head reads: the average over all positions, or the first of the tokens [N, T, C], the class token."""
    pool: int = Field(default=1, ge=1, le=16)
    """Side to which maps are averaged for pooled heads; shrunk to what divides the map."""
    mask: str | None = None
    """Name of the task's input [N, T] that is not zero where a token counts; pooled heads average over those only."""
    hidden: int = Field(default=0, ge=0)
    """Width of a hidden layer with ReLU in every head; 0: heads are linear, as published."""
    policy: Literal[
        "class_exclusion_softmax", "class_exclusion", "class_exclusion_permanent", "max_probability", "entropy"
    ] = "class_exclusion_softmax"
    """Rule that decides who leaves: one class is left (softmax: classes are ruled out by their probabilities, heads
    learn by cross entropy; plain: as published, each class by its own sigmoid and binary cross entropy; permanent: the
    same, and what is ruled out never comes back), the best class is probable enough, or the entropy is low enough."""

    @field_validator("at_macs")
    @classmethod
    def _check_shares(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if any(not 0.0 < share < 1.0 for share in value or ()):
            raise ValueError("each entry is a share of the network's MACs, between 0 and 1")
        return value

    @model_validator(mode="after")
    def _check_places(self) -> EarlyExitConfig:
        given = [name for name in ("at", "at_macs", "auto") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give `{given[0]}` or `{given[1]}`, not both")
        if self.at_macs == ():
            raise ValueError("give at least one place in `at_macs`, or leave it out")
        if self.head == "token" and self.mask is not None:
            raise ValueError("`mask` is for pooled heads, `head: token` reads one token: remove one of them")
        if self.max_wrong_exclusion is not None and not policy_named(self.policy).excludes:
            raise ValueError(f"max_wrong_exclusion needs a policy that excludes classes, {self.policy} does not")
        if self.latency_table is not None and self.auto is not None:
            raise ValueError("a latency_table is of known exits: name them in `at`, as `auto` found them before")
        return self
