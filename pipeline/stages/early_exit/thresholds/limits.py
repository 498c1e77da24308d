"""What the thresholds of a network with exits must fulfil, and which of two settings is the better one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from torch import Tensor

from ....errors import InputError
from ....stage import StageConfig
from ..mix import read_latency_table
from .trials import Trials

_ROUNDING = 1e-9
_TIE = 1e-6  # what the second criterion counts beside the first


class LatencyTable(StageConfig):
    """How long a row takes that leaves at each exit, as measured on the device (`latency-table`)."""

    exits: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=2)] = (1.0, 1.0)
    """Microseconds of a row that leaves at the first exit, the second, ..., at the network's end."""
    device: str = ""
    """Where it was measured, for the report."""


def _read_table(value: Any, info: ValidationInfo) -> Any:
    """The content of the file that a path names, so that caches know the numbers and not only the path."""
    if not isinstance(value, str | Path):
        return value
    folder = (info.context or {}).get("folder", Path())
    try:
        return read_latency_table(Path(folder) / Path(value).expanduser())
    except InputError as error:
        raise ValueError(str(error)) from None  # pydantic names the field


class ExitSearchConfig(StageConfig):
    """What the thresholds must fulfil, and how they are looked for."""

    search: Literal["coordinate", "greedy", "geometric"] = "coordinate"
    """`greedy`: as published, one exit after the other (METHODS §2.5). `geometric`: MSDNet's schedule, each exit takes
    a constant multiple of the rows of the one before (METHODS §7.1). `coordinate`: descent on the mean cost from
    several starts, the results of both among them, so it is never worse on validation."""
    tolerance: float = Field(default=0.005, ge=0.0, le=1.0)
    """Validation accuracy that the exits may cost, against the same network run to its end (0.005 = half a point)."""
    confidence: float | None = Field(default=None, gt=0.5, lt=1.0)
    """None: the tolerance holds on the validation rows, which the thresholds are chosen on; on other rows the loss is
    larger, the more so the fewer validation rows there are. 0.95: it holds with as many standard errors of the paired
    difference to spare as keep it there 19 times of 20, were the difference normal and not chosen. For `tolerance`
    alone; budgets do not use it."""
    max_worst_class_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """Like `tolerance`, for the worst class' accuracy, without `confidence`; None sets none."""
    max_wrong_exclusion: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of the validation rows that may end with their true class excluded; needs a policy that excludes."""
    min_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the validation rows that every exit, the network's own end included, must take if the tolerance allows
    it; needs `search: coordinate`."""
    budgets: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = ()
    """Each adds an operating point `budget_<percent>` with the best validation accuracy at a mean cost of at most this
    share of the deepest path, whatever the tolerance says."""
    latency_table: Annotated[
        LatencyTable | None, BeforeValidator(_read_table, json_schema_input_type=LatencyTable | str | None)
    ] = None
    """Path of a JSON file (or its content) with measured microseconds per exit: the cost is then latency, not MACs."""
    restarts: int = Field(default=3, ge=0)
    """Random starts of the coordinate search."""

    @model_validator(mode="after")
    def _check_search(self) -> ExitSearchConfig:
        if self.search != "coordinate" and self.min_share is not None:
            raise ValueError(f"min_share needs search: coordinate; the {self.search} search cannot aim at shares")
        names = [budget_name(budget) for budget in self.budgets]
        if len(set(names)) < len(names):
            raise ValueError("budgets: two entries are the same percentage, remove one")
        return self


def budget_name(budget: float) -> str:
    """Name of the operating point of a budget: ``budget_40``, ``budget_12.5``."""
    return f"budget_{100 * budget:g}"


@dataclass(frozen=True)
class Limits:
    """What a setting of the thresholds must keep to, and so what it is after: least cost, or most accuracy.

    Attributes:
        accuracy: at least this.
        worst_class: accuracy of the worst class at least this.
        min_share: of the rows at every exit at least this.
        wrong_exclusion: at most this share of the rows ends with its true class excluded.
        budget: mean cost at most this, in units of the deepest path; with it the best setting is the most accurate,
            without it the cheapest.
        errors: `accuracy` is kept with so many standard errors (`Trials.accuracy_error`) to spare.
    """

    accuracy: float | None = None
    worst_class: float | None = None
    min_share: float | None = None
    wrong_exclusion: float | None = None
    budget: float | None = None
    errors: float = 0.0

    def violation(self, trials: Trials) -> Tensor:
        """Float64 [T], how far each trial is outside, 0 if it keeps to everything."""
        missing = torch.zeros_like(trials.accuracy)
        if self.accuracy is not None:
            sure = trials.accuracy - self.errors * trials.accuracy_error
            missing = missing + (self.accuracy - sure).clamp(min=0.0)
        if self.worst_class is not None:
            missing = missing + (self.worst_class - trials.worst_class_accuracy).clamp(min=0.0)
        if self.min_share is not None:
            missing = missing + (self.min_share - trials.shares).clamp(min=0.0).sum(dim=1)
        if self.wrong_exclusion is not None:
            missing = missing + (trials.wrong_exclusions - self.wrong_exclusion).clamp(min=0.0)
        if self.budget is not None:
            missing = missing + (trials.mean_cost - self.budget).clamp(min=0.0)
        return torch.where(missing > _ROUNDING, missing, 0.0)

    def objective(self, trials: Trials, price: float | None = None) -> Tensor:
        """Float64 [T], smaller is better; `price` is paid per point of violation, without it the limits are walls.

        Among equal costs the more accurate setting; among equal accuracies within a budget the dearer one, because
        deeper heads are right more often on rows that validation does not have.
        """
        if self.budget is None:
            value = trials.mean_cost - _TIE * trials.accuracy
        else:
            value = -trials.accuracy - _TIE * trials.mean_cost
        violation = self.violation(trials)
        if price is not None:
            return value + price * violation
        return torch.where(violation > 0.0, 10.0 + violation, value)
