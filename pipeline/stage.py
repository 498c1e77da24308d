"""The contract of a compression stage, and everything that passes through it.

A stage is one module or folder in `pipeline/stages/`, or of another package, with one frozen pydantic config, the two
functions `fit` and `rebuild`, and a `STAGE = Stage(...)` that names them and brings everything else that only this
stage knows: checks, tolerances, operating points, requirements, what the report shows of it. The shared rooms know this
contract and no stage. What we compare against is a criterion inside a stage, never a second stage.

- `fit(model, task, config, context) -> StageResult` may use data, time and randomness. It may change `model` in
  place: the runner hands it a copy. It returns the model in eval mode, on the CPU.
- `rebuild(model, edit) -> model` turns the model that `fit` was given into one with the *structure* that `fit`
  returned: same modules, same state-dict keys, same shapes, same sharing. It uses nothing but `edit`: no data, no
  randomness, no recomputed choice. The values come from the checkpoint's `weights.safetensors`, which is loaded
  once, after the last edit; `edit.tensors` are for structure that is too large for JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

if TYPE_CHECKING:
    from edgewright.edge_runtime.bundle.manifest import OperatingPoint
    from edgewright.export.options import ExportOptions

    from .section import FinishedStage, Section
    from .task import SplitName, Task
    from .training.training import TrainingConfig

Json: TypeAlias = Any
"""None, bool, int, float, str, or lists and string-keyed dicts of them."""


class StageConfig(BaseModel):
    """Base of every stage's configuration: frozen, unknown keys refused, every field described and with a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_own_defaults(cls, value: Any) -> Any:
        """A section that is given in part keeps this stage's defaults in the rest, not those of the section's class."""
        if not isinstance(value, Mapping):
            return value
        filled = dict(value)
        for name, info in cls.model_fields.items():
            if isinstance(info.default, StageConfig) and isinstance(filled.get(name), Mapping):
                filled[name] = {**info.default.model_dump(exclude_unset=True), **filled[name]}
        return filled


C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Edit:
    """What a stage did to the structure of a model: all that `rebuild` needs."""

    stage: str
    data: Mapping[str, Json] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """What `fit` returns.

    Attributes:
        model: the compressed model, eval mode, CPU.
        edit: see `Edit`.
        metrics: JSON for the report only.
        artifacts: numeric arrays for the report only (scores, threshold trials), by name.
        notes: sentences for the report; a stage that did not reduce MACs or parameters says here why.
    """

    model: nn.Module
    edit: Edit
    metrics: Mapping[str, Json] = field(default_factory=dict)
    artifacts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preview:
    """What a stage would do with a model, found in seconds and without training.

    Attributes:
        summary: one sentence.
        takes: module path -> what can be done there, in the order of the model.
        leaves: module path -> why nothing can.
        notes: what else the user should know.
        figures: the same for programs.
    """

    summary: str
    takes: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a long stage saves to be able to go on after an interruption."""

    data: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


class Progress(Protocol):
    """Shows how far long work has come; silent when not on a terminal."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yields `items`, showing the share done and the time left."""
        ...

    def say(self, text: str) -> None:
        """One line about what is happening."""
        ...


T = TypeVar("T")


class Context(Protocol):
    """What the runner gives a stage beside model, task and config."""

    @property
    def seed(self) -> int:
        """The recipe's seed mixed with the position of the stage."""
        ...

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        ...

    @property
    def progress(self) -> Progress:
        """Where to report progress."""
        ...

    def generator(self, *name: str | int) -> torch.Generator:
        """A CPU generator whose seed depends on `seed` and `name` only, e.g. ``generator("shuffle", epoch)``."""
        ...

    def save(self, name: str, state: State) -> None:
        """Stores the stage's progress under `name`, replacing what was there; atomic.

        A nested piece of work (the epochs inside a pruning iteration) uses a name of its own.
        """
        ...

    def load(self, name: str) -> State | None:
        """What an interrupted run saved last under `name`, or None."""
        ...


@dataclass(frozen=True)
class Requirement:
    """Something that ``require`` of a recipe may ask of a run with this stage; checked on the finished report.

    Attributes:
        about: one sentence for the schema.
        missed: from the content of report.json to what is missed, a sentence each.
    """

    about: str
    missed: Callable[[Mapping[str, Json]], Sequence[str]]


@dataclass(frozen=True)
class ExpectedMacs:
    """What the exported graph costs where it differs from PyTorch's count on purpose.

    Attributes:
        macs: of the graph, to its end.
        because: the sentence for the report.
    """

    macs: float
    because: str


@dataclass(frozen=True)
class Stage(Generic[C]):
    """The declaration of a stage.

    Attributes:
        name: as recipes write it.
        config: its configuration class.
        fit: see the module's text.
        rebuild: see the module's text.
        requires: stages that must have come before.
        after: stages that, where the recipe has them too, must all have come before; with the reason shown to
            the user. The later stage of two says it: whoever adds a stage need not touch the others.
        forbids: stages that must not have come before, with the reason shown to the user.
        splits: the data splits `fit` may read; `test` is never among them.
        splits_for: which of them a configuration needs, all if None; checked before any compute.
        per_class: whether the task must have classes, each with samples in `train` and `calibration` where they are
            needed; a function of configuration and task where it depends on them.
        check: judges a configuration by the base model (eval mode, unchanged) before any compute, e.g. names that
            it does not have; raises an `InputError`.
        classes: the classes (names or indices) that a model made under a configuration still knows, () for all. What
            comes after, export and report included, gets the task with these classes only.
        trains: the trainings of the whole model under a configuration, by the name of their section in the recipe, ""
            for the stage's own; each is tried for one step before any compute. None: every `TrainingConfig` in it.
        classes_alone: a configuration of the same stage that keeps the same classes and does nothing else to the model;
            what a control is given. Required with `classes`.
        answers: the kinds of answers (`edge_runtime.answers`) that it serves, all if None; it is given a model of
            one tensor then. Others are refused before any compute.
        preview: what it would do with a model (eval mode, unchanged) under a configuration; of the inputs some rows,
            and the task if there is one. Raises an `EdgewrightError` where the stage would refuse.
    """

    name: str
    config: type[C]
    fit: Callable[[nn.Module, Task, C, Context], StageResult]
    rebuild: Callable[[nn.Module, Edit], nn.Module]
    requires: frozenset[str] = frozenset()
    after: Mapping[str, str] = field(default_factory=dict)
    forbids: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[SplitName, ...] = ()
    splits_for: Callable[[C], tuple[SplitName, ...]] | None = None
    per_class: bool | Callable[[C, Task], bool] = False
    check: Callable[[nn.Module, Task, C], None] | None = None
    classes: Callable[[C], Sequence[str | int]] | None = None
    trains: Callable[[C], Mapping[str, TrainingConfig]] | None = None
    classes_alone: Callable[[C], C] | None = None
    check_export: Callable[[C, ExportOptions], None] | None = None
    tolerances: tuple[str, ...] = ()
    dense: bool = False
    branches: bool = False
    operating_points: Callable[[Edit], Sequence[OperatingPoint]] | None = None
    expected_macs: Callable[[Mapping[str, Json], float], ExpectedMacs | None] | None = None
    requirements: Mapping[str, Requirement] = field(default_factory=dict)
    report: Callable[[FinishedStage], Section | None] | None = None
    answers: frozenset[str] | None = None
    preview: Callable[[nn.Module, tuple[Tensor, ...], Task | None, C], Preview] | None = None

    def needs_classes(self, config: C, task: Task) -> bool:
        """Whether `task` must have classes with samples under `config`."""
        return self.per_class if isinstance(self.per_class, bool) else self.per_class(config, task)

    def needed_splits(self, config: C) -> tuple[SplitName, ...]:
        """The splits that `fit` reads under `config`."""
        return self.splits if self.splits_for is None else self.splits_for(config)
