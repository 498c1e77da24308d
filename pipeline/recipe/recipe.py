"""What to do with which model on which data: the typed recipe, read from YAML or JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, ValidationInfo, model_validator

from edgewright.export.options import ExportOptions

from ..errors import RecipeError, StageOrderError
from ..stage import StageConfig
from ..stage_registry import requirements, stage_named
from ..store.atomic import plain, write_text
from ..training.training import TrainingConfig
from .text import apply_overrides, check_numbers, expand_shorthands, read_recipe_data
from .validation import SectionError, explain, nearest

RESERVED_IDS = ("base", "dense", "control")
"""Names of rows of the report that are no stages."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSpec(_Section):
    """The network to compress. A plain text is short for its `name`."""

    name: str
    """``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER``, ``python:package.module:function`` or
    ``python:path/to/file.py:function``; `edgewright models` lists the first three."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function that builds it."""
    weights: Path | None = None
    """Weights to load, .safetensors, or .pt / .pth with plain tensors."""
    fold: bool = True
    """Whether weight norms and the like become plain weights, and branches that a network brings a method to join
    (`reparameterize`, `switch_to_deploy`, `fuse`) one layer: before anything else, or behind the trainings that the
    recipe begins with, which want them."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TaskSpec(_Section):
    """Data, loss and metric. A plain text is short for its `name`."""

    name: str
    """The name of a shipped task, ``python:package.module:function`` or
    ``python:path/to/file.py:function``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StageEntry(_Section):
    """One stage: ``{name: STAGE, ...the fields of its configuration}``. A plain text is short for its
    `name`."""

    name: str
    """The stage."""
    id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Its name in the report; null takes the stage's own, numbered if it runs twice."""
    config: SerializeAsAny[StageConfig]

    @model_validator(mode="before")
    @classmethod
    def _inline(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or isinstance(value.get("config"), StageConfig):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError("a stage is a mapping with a `name`, for example {name: train, epochs: 5}")
        try:
            kind: type[StageConfig] = stage_named(value["name"]).config
        except RecipeError as error:
            raise ValueError(str(error)) from None
        own = {key: item for key, item in value.items() if key in ("name", "id")}
        fields = {key: item for key, item in value.items() if key not in own}
        try:
            return {**own, "config": kind.model_validate(fields, context=info.context)}
        except ValidationError as error:
            raise SectionError(error, kind, beside=("name", "id")) from None


class BenchmarkOptions(_Section):
    """How the bundles are timed on this machine."""

    enabled: bool = True
    """Whether to time at all."""
    providers: tuple[str, ...] = Field(default=("cpu",), min_length=1)
    """Execution providers; one that is not available is an error, never a silent fallback."""
    threads: int | None = Field(default=1, ge=1)
    """Threads inside an operator; null leaves the choice to ONNX Runtime."""
    seconds: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Least time to measure each model for."""
    min_samples: int = Field(default=64, ge=11)
    """Least number of timed runs (64 carry a p90); a percentile that they cannot carry is not reported."""


class ControlSpec(_Section):
    """A control row: the base model at reduced width, trained from scratch, at the MACs of the compressed model."""

    argument: str
    """Argument of the model's function that scales its width, e.g. ``width_factor``."""
    between: tuple[float, float] = (0.05, 1.0)
    """Where to look for the value that meets the MACs. Two whole numbers that are not neighbours, e.g. [8, 64], stand
    for an argument that takes whole numbers only."""
    training: TrainingConfig
    """How to train it; give it as many epochs as all stages together."""


class Requirements(_Section):
    """What the result must fulfil on the test split; a miss is exit code 4, with everything written.

    Stages add fields of their own (`Stage.requirements`): true asks for what they say.
    """

    max_accuracy_drop: float | None = Field(default=None, ge=0.0, le=1.0)
    """Largest fall of test accuracy against the reference (0.01 is one point). What was measured on the test rows
    counts; where the interval of the drop reaches further, the report notes how many rows could promise it."""
    max_drop: float | None = Field(default=None, ge=0.0)
    """The same of the task's own metric, in the unit of its tolerances; for tasks without accuracy too."""
    macs_reduction: float | None = Field(default=None, gt=0.0)
    """Least MACs of the reference over mean MACs of the result."""
    bytes_reduction: float | None = Field(default=None, gt=0.0)
    """Least unique weight bytes of the reference over those of the result."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _stages_know_the_rest(self) -> Requirements:
        extra = dict(self.model_extra or {})
        if not extra:
            return self
        known = {name: about for name, (_, about) in requirements().items()}
        for name, value in extra.items():
            if name not in known:
                names = [*type(self).model_fields, *known]
                close = nearest(name, names)
                hint = f"did you mean {close!r}?" if close else f"here may stand: {', '.join(names)}"
                raise ValueError(f"unknown key {name!r}; {hint}")
            if not isinstance(value, bool):
                raise ValueError(f"{name!r} is {value!r} and should be true or false")
        return self

    @property
    def of_stages(self) -> tuple[str, ...]:
        """What is required that a stage knows how to judge, see `Stage.requirements`."""
        return tuple(name for name, wanted in (self.model_extra or {}).items() if wanted)


class ReportOptions(_Section):
    """What the report page shows; changing it runs nothing again."""

    layer: str | None = None
    """Layer of a pruned model whose filters are drawn class by class; null: the one whose filters differ most."""


class Recipe(_Section):
    """Everything a run depends on, apart from the files it names."""

    name: str = ""
    """For reports; default: the name of the recipe file."""
    root: Path | None = None
    """Folder that relative paths start from; default: the folder of the recipe file."""
    model: ModelSpec
    task: TaskSpec
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of every random choice."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where stages compute."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of PyTorch; null leaves the choice to it. Another number may change the last bits of a result."""
    stages: tuple[StageEntry, ...] = ()
    """In the order they run; an empty list exports and verifies the model as it is."""
    export: ExportOptions = ExportOptions()
    benchmark: BenchmarkOptions = BenchmarkOptions()
    control: ControlSpec | None = None
    """A row beside the stages that shows what a network built small reaches."""
    require: Requirements = Requirements()
    report: ReportOptions = ReportOptions()

    @model_validator(mode="after")
    def _ids_differ(self) -> Recipe:
        seen: set[str] = set(RESERVED_IDS)
        for entry in self.stages:
            if entry.id is not None and entry.id in seen:
                raise ValueError(f"the id {entry.id!r} of a stage is taken: give it another")
            seen.add(entry.id or "")
        return self

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return (self.root or Path()).absolute()

    @property
    def step_ids(self) -> tuple[str, ...]:
        """The name of every stage in the report, each once."""
        taken = {entry.id for entry in self.stages if entry.id is not None}
        ids: list[str] = []
        for entry in self.stages:
            wanted, number = entry.id or entry.name, 2
            while entry.id is None and wanted in taken:
                wanted, number = f"{entry.name}-{number}", number + 1
            taken.add(wanted)
            ids.append(wanted)
        return tuple(ids)

    def resolve(self, path: Path) -> Path:
        """`path` as an absolute one."""
        return self.folder / path.expanduser()

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, as plain data that `parse_recipe` turns into an equal recipe."""
        data: dict[str, Any] = plain(self.model_dump())
        data["root"] = str(self.folder)
        data["stages"] = [
            {"name": entry.name, "id": step, **plain(entry.config.model_dump())}
            for entry, step in zip(self.stages, self.step_ids, strict=True)
        ]
        return data


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: YAML or JSON.
        overrides: ``a.b.0.c=value``, applied in order; values are YAML.

    Raises:
        RecipeError: unreadable, an unknown key, or a value that does not fit; names the full path of the key.
        StageOrderError: the stages stand in an order that cannot work.
    """
    path = Path(path)
    data = read_recipe_data(path)
    stem = re.sub(r"\.resolved$", "", path.stem)
    return parse_recipe(data, path.absolute().parent, overrides, source=str(path), name=stem)


def parse_recipe(
    data: Mapping[str, Any],
    root: Path,
    overrides: Sequence[str] = (),
    source: str = "the recipe",
    name: str = "",
) -> Recipe:
    """Checks plain data, for a recipe that is not in a file.

    Args:
        data: as in the file.
        root: the folder that relative paths start from.
        overrides: see `load_recipe`.
        source: what errors call it.
        name: the name to take if the data has none.

    Raises:
        RecipeError: see `load_recipe`.
        StageOrderError: see `load_recipe`.
    """
    whole = apply_overrides(expand_shorthands(dict(data)), overrides)
    check_numbers(whole, source)
    if not whole.get("name"):
        whole["name"] = name
    try:
        # files that a value names are read from the same folder as all others
        folder = root.absolute() / Path(str(whole.get("root") or "")).expanduser()
        recipe = Recipe.model_validate(whole, context={"folder": folder})
    except ValidationError as error:
        sentences = explain(error, Recipe)
        start = f"{source}: " if len(sentences) == 1 else f"{source}:\n  "
        raise RecipeError(start + "\n  ".join(sentences)) from None
    if not folder.is_dir():
        raise RecipeError(f"{source}: 'root' names {folder}, which is no folder: correct it or leave it out")
    stages = tuple(
        entry.model_copy(update={"id": step}) for entry, step in zip(recipe.stages, recipe.step_ids, strict=True)
    )
    recipe = recipe.model_copy(update={"root": folder, "stages": stages})
    check_numbers(recipe.resolved(), source)  # again, because the text "nan" becomes a number where one is wanted
    check_order(recipe)
    return recipe


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Writes `recipe` with every default, so that `load_recipe(path) == recipe`."""
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=110)
    write_text(path, text)


def check_order(recipe: Recipe) -> None:
    """Refuses stages in an order that cannot work, before anything is computed.

    Raises:
        StageOrderError: names both stages and the reason.
    """
    before: dict[str, int] = {}
    for position, entry in enumerate(recipe.stages):
        stage = stage_named(entry.name)
        missing = sorted(stage.requires - before.keys())
        if missing:
            raise StageOrderError(
                f"stages.{position}: {entry.name!r} needs {missing[0]!r} before it; "
                + (f"move {missing[0]!r} up" if any(e.name == missing[0] for e in recipe.stages) else "add it")
            )
        late = next((i for i, e in enumerate(recipe.stages[position:], position) if e.name in stage.after), None)
        if late is not None:
            name = recipe.stages[late].name
            raise StageOrderError(
                f"stages.{late}: {name!r} cannot come after {entry.name!r} (stages.{position}): {stage.after[name]}"
            )
        for other in before:
            if other in stage.forbids:
                raise StageOrderError(
                    f"stages.{position}: {entry.name!r} cannot come after {other!r} "
                    f"(stages.{before[other]}): "
                    f"{stage.forbids[other]}"
                )
        before[entry.name] = position
