"""Recipes: what they may say, what they are refused for, and that they survive being written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from edgewright.export.options import ExportOptions
from edgewright.models.registry import build
from edgewright.pipeline import stage_registry
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.cli import RECIPES
from edgewright.pipeline.errors import RecipeError, StageOrderError
from edgewright.pipeline.recipe import recipe as recipe_module
from edgewright.pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe, save_resolved
from edgewright.pipeline.recipe.schema import SCHEMA_FILE, json_schema, schema_text
from edgewright.pipeline.stage import Edit, Stage, StageConfig, StageResult
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig
from edgewright.pipeline.training.training import TrainingConfig

SMALL: dict[str, Any] = {"model": "zoo:net", "task": "some_task", "stages": ["train"]}


def parse(data: Mapping[str, Any], *overrides: str, root: Path = Path()) -> Recipe:
    return parse_recipe(data, root, overrides)


def refusal(data: Mapping[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(data, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


class NestedConfig(StageConfig):
    """A configuration with another inside, as stages that retrain have."""

    rate: float = 0.5
    """A number."""
    retrain: TrainingConfig = TrainingConfig()
    """How to train."""
    groups: tuple[TrainingConfig, ...] = ()
    """Several."""


def _never(*_: Any) -> StageResult:
    raise AssertionError("checks come before compute")


def _same(model: nn.Module, edit: Edit) -> nn.Module:
    del edit
    return model


FAKES = {
    "nested": Stage("nested", NestedConfig, _never, _same),
    "needs_nested": Stage("needs_nested", NestedConfig, _never, _same, requires=frozenset({"nested"})),
    "not_after_nested": Stage(
        "not_after_nested", NestedConfig, _never, _same, forbids={"nested": "the basis would break"}
    ),
    "wants_to_be_last": Stage(
        "wants_to_be_last", NestedConfig, _never, _same, after={"nested": "it reads what nested leaves"}
    ),
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = stage_registry.stage_named
    monkeypatch.setattr(recipe_module, "stage_named", lambda name: FAKES.get(name) or real(name))
    yield


def test_four_lines_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: torchvision:resnet18\ntask: python:data.py:task\nstages:\n  - train\n")
    recipe = load_recipe(path)
    assert recipe.model.name == "torchvision:resnet18"
    assert recipe.task.name == "python:data.py:task"
    assert recipe.name == "mine"
    assert recipe.folder == tmp_path
    assert recipe.stages[0].config == stage_registry.stage_named("train").config()
    assert recipe.export == ExportOptions()


def test_no_stages_is_legal() -> None:
    assert parse({"model": "zoo:net", "task": "t"}).stages == ()
    assert parse({"model": "zoo:net", "task": "t", "stages": []}).stages == ()


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**SMALL, "stages": [{"name": "train", "epochs": 7}]}, indent="\t"))
    assert load_recipe(path).stages[0].config.epochs == 7  # type: ignore[attr-defined]


def test_scientific_numbers_and_dates_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: zoo:net, args: {a: 1e-3, b: 2E+2, c: 2024-01-02, d: 1e3x}}\ntask: t\n")
    assert load_recipe(path).model.args == {"a": 1e-3, "b": 200.0, "c": "2024-01-02", "d": "1e3x"}


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({**SMALL, "benchmrk": {}}, ["unknown key 'benchmrk'", "did you mean 'benchmark'?"]),
        ({**SMALL, "model": {"name": "zoo:net", "wieghts": "x"}}, ["'model.wieghts'", "'model.weights'"]),
        (
            {**SMALL, "stages": [{"name": "train", "learning_rat": 1}]},
            ["unknown key 'stages.0.learning_rat'", "did you mean 'stages.0.learning_rate'?"],
        ),
        ({**SMALL, "export": {"tolerance": {"abz": 1}}}, ["'export.tolerance.abz'", "'export.tolerance.abs'"]),
        ({**SMALL, "export": {"zzzzzz": 1}}, ["'export.zzzzzz'", "here may stand: batch, opset"]),
        ({"task": "t"}, ["'model' is missing"]),
        ({**SMALL, "stages": ["trian"]}, ["'stages.0'", "unknown stage 'trian'", "did you mean 'train'?"]),
        ({**SMALL, "stages": [{"epochs": 3}]}, ["'stages.0'", "a mapping with a `name`"]),
        ({**SMALL, "stages": "train"}, ["'stages' is 'train'", "tuple"]),
        ({**SMALL, "stages": [{"name": "train", "epochs": "many"}]}, ["'stages.0.epochs' is 'many'", "integer"]),
        (
            {**SMALL, "export": {"batch": "all"}},
            ["'export.batch' is 'all'", "'auto', 'single', 'dynamic' or 'compact'"],
        ),
        ({**SMALL, "seed": -1}, ["'seed' is -1", "greater than or equal to 0"]),
        ({**SMALL, "export": {"tolerance": {"abs": float("nan")}}}, ["'export.tolerance.abs' is nan", "finite"]),
        ({**SMALL, "stages": [{"name": "train", "id": "a b"}]}, ["'stages.0.id'"]),
        (
            {**SMALL, "stages": [{"name": "train", "id": "a"}, {"name": "train", "id": "a"}]},
            ["the id 'a' of a stage is taken"],
        ),
        ({**SMALL, "stages": [{"name": "train", "id": "dense"}]}, ["the id 'dense' of a stage is taken"]),
        ({**SMALL, "root": "/no/such/folder"}, ["'root' names /no/such/folder"]),
    ],
)
def test_refusals_name_the_path_and_what_is_wanted(data: dict[str, Any], wanted: list[str]) -> None:
    text = refusal(data)
    for part in wanted:
        assert part in text


def test_every_problem_is_listed_at_once() -> None:
    text = refusal({**SMALL, "seed": "x", "stages": ["trian"], "exprt": {}})
    assert [part in text for part in ("'seed'", "'stages.0'", "'exprt'")] == [True] * 3


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"retrain": {"epoch": 1}}, "unknown key 'stages.0.retrain.epoch'; did you mean 'stages.0.retrain.epochs'?"),
        (
            {"groups": [{}, {"momentun": 1}]},
            "unknown key 'stages.0.groups.1.momentun'; did you mean 'stages.0.groups.1.momentum'?",
        ),
        ({"idd": "x"}, "unknown key 'stages.0.idd'; did you mean 'stages.0.id'?"),
    ],
)
def test_nested_configurations_name_the_nearest_key(fields: dict[str, Any], wanted: str) -> None:
    assert wanted in refusal({**SMALL, "stages": [{"name": "nested", **fields}]})


@pytest.mark.usefixtures("fakes")
def test_illegal_orders_are_refused_with_the_reason() -> None:
    with pytest.raises(
        StageOrderError,
        match=r"stages\.1: 'not_after_nested'.*'nested' \(stages\.0\).*basis "
        r"would",
    ):
        parse({**SMALL, "stages": ["nested", "not_after_nested"]})
    with pytest.raises(StageOrderError, match=r"stages\.0: 'needs_nested' needs 'nested' before it; add it"):
        parse({**SMALL, "stages": ["needs_nested"]})
    with pytest.raises(StageOrderError, match="move 'nested' up"):
        parse({**SMALL, "stages": ["needs_nested", "nested"]})
    with pytest.raises(
        StageOrderError,
        match=r"stages\.1: 'nested' cannot come after 'wants_to_be_last' \(stages\.0\): it reads what nested leaves",
    ):
        parse({**SMALL, "stages": ["wants_to_be_last", "nested"]})
    assert len(parse({**SMALL, "stages": ["nested", "wants_to_be_last"]}).stages) == 2
    assert len(parse({**SMALL, "stages": ["not_after_nested", "nested", "needs_nested"]}).stages) == 3


class TestOverrides:
    def test_values_are_yaml(self) -> None:
        recipe = parse(SMALL, "stages.0.epochs=3", "export.zip=true", "seed=5", "model.args.width=[1, 2]")
        assert recipe.stages[0].config.epochs == 3  # type: ignore[attr-defined]
        assert (recipe.export.zip, recipe.seed, recipe.model.args) == (True, 5, {"width": [1, 2]})

    def test_whole_sections_and_shorthands(self) -> None:
        recipe = parse(SMALL, "model=zoo:other", "model.args.a=1", "stages=[train, train]", "stages.1.epochs=2")
        assert recipe.model.name == "zoo:other"
        assert recipe.step_ids == ("train", "train-2")
        assert recipe.stages[1].config.epochs == 2  # type: ignore[attr-defined]

    def test_a_value_may_hold_an_equals_sign(self) -> None:
        assert parse(SMALL, "model.args.text=a=b").model.args == {"text": "a=b"}

    @pytest.mark.parametrize(
        ("override", "wanted"),
        [
            ("stages.0.epoch=3", "did you mean 'stages.0.epochs'?"),
            ("exprt.zip=true", "did you mean 'export'?"),
            ("stages.4.epochs=3", "'stages' has the positions 0 to 0, not '4'"),
            ("stages.first.epochs=3", "'stages' has the positions 0 to 0, not 'first'"),
            ("model.name.x=3", "'model.name' is text, nothing lies below it"),
            ("seed", "write it as PATH=VALUE"),
            ("=3", "write it as PATH=VALUE"),
            ("seed=[1", "--set seed=[1"),
            ("seed=many", "'seed' is 'many'"),
        ],
    )
    def test_refusals(self, override: str, wanted: str) -> None:
        assert wanted in refusal(SMALL, override)


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            (b"model: a\ntask: b\nmodel: c\n", "line 3, column 1: the key 'model' stands here twice"),
            (b"model: [\n", "line 2"),
            (b"- a\n- b\n", "holds a list"),
            (b"", "is empty"),
            (b"\xff\xfe\x00\x01", "is not UTF-8"),
            (b"model: !!python/object/apply:os.system [ls]\ntask: t\n", "could not determine a constructor"),
            (b"[1]: 2\n", "line 1"),
        ],
    )
    def test_broken_files(self, tmp_path: Path, content: bytes, wanted: str) -> None:
        path = tmp_path / "r.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert wanted in str(caught.value) and str(path) in str(caught.value)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="there is no recipe"):
            load_recipe(tmp_path / "no.yaml")
        with pytest.raises(RecipeError, match="is a folder"):
            load_recipe(tmp_path)

    def test_relative_paths_start_at_the_recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "deep").mkdir()
        path = tmp_path / "deep" / "r.yaml"
        path.write_text("model: {name: zoo:net, weights: w.pt}\ntask: t\n")
        monkeypatch.chdir(tmp_path)
        recipe = load_recipe(Path("deep/r.yaml"))
        assert recipe.model.weights is not None
        assert recipe.resolve(recipe.model.weights) == tmp_path / "deep" / "w.pt"


class TestResolved:
    def test_loads_to_the_same_recipe(self, tmp_path: Path) -> None:
        data = {
            "model": {"name": "zoo:net", "args": {"w": [1, 2.5], "x": None}, "weights": "w.safetensors"},
            "task": {"name": "t", "args": {"path": "data"}},
            "seed": 3,
            "stages": ["train", {"name": "train", "id": "again", "learning_rate": 1e-5}, "train"],
            "export": {"opset": 20, "tolerance": {"rel": 1e-7}},
        }
        recipe = parse_recipe(data, tmp_path, name="mine")
        save_resolved(recipe, tmp_path / "out" / "recipe.resolved.yaml")
        again = load_recipe(tmp_path / "out" / "recipe.resolved.yaml")
        assert again == recipe
        assert again.folder == tmp_path
        assert recipe.step_ids == ("train", "again", "train-2")

    def test_holds_every_default(self, tmp_path: Path) -> None:
        save_resolved(parse(SMALL), tmp_path / "r.yaml")
        data = yaml.safe_load((tmp_path / "r.yaml").read_text())
        assert set(data) == set(Recipe.model_fields)
        train = stage_registry.stage_named("train").config
        assert set(data["stages"][0]) == {"name", "id", *train.model_fields}
        assert data["benchmark"]["min_samples"] == 64

    def test_recipes_are_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            parse(SMALL).seed = 4  # type: ignore[misc]


class TestSchema:
    def test_shipped_file_is_current(self) -> None:
        assert SCHEMA_FILE.read_text() == schema_text(), (
            "run `python -m edgewright.pipeline.recipe.schema` and commit the file"
        )

    def test_every_stage_with_its_fields(self) -> None:
        schema = json_schema()
        for name in stage_registry.SHIPPED:
            definition = schema["$defs"][f"stage {name}"]
            assert definition["additionalProperties"] is False
            fields = stage_registry.stage_named(name).config.model_fields
            assert set(definition["properties"]) == {"name", "id", *fields}
            assert all("description" in p or "$ref" in p for p in definition["properties"].values())

    def test_references_resolve(self) -> None:
        schema = json_schema()
        references = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
        assert references == set(schema["$defs"])


def test_json_repeats_no_key(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"model": "a", "task": "b", "model": "c"}')
    with pytest.raises(RecipeError, match="the key 'model' stands twice"):
        load_recipe(path)


def test_every_shipped_recipe_loads() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        assert load_recipe(path).stages is not None


@pytest.mark.parametrize(
    ("name", "macs"),
    [("cifar10_vgg16", 313_463_808), ("cifar100_vgg19", 398_182_400), ("cifar10_resnet56", 125_485_696)],
)
def test_published_recipes_name_the_published_networks(name: str, macs: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model = build(recipe.model.name, recipe.model.args, recipe.folder)
    assert count(model, (torch.zeros(1, 3, 32, 32),)).macs == macs
    config = recipe.stages[1].config
    assert isinstance(config, ClassAwarePruningConfig) and config.target_mac_reduction is None
    assert (config.lambda1, config.lambda_o, config.threshold_frac, config.images_per_class) == (1e-4, 1e-2, 0.3, 10)
    assert recipe.task.args["classes"] == recipe.model.args["classes"]
