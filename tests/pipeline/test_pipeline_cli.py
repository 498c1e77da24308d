"""The command line: exit codes, texts without tracebacks, and the way from options to the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_on_disk import without_later_phases, write_recipe

from edgewright.pipeline import cli, errors
from edgewright.pipeline.recipe.schema import json_schema
from edgewright.pipeline.runs import runner


@pytest.fixture(autouse=True)
def stages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_prints_a_row_per_step_and_where_things_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = write_recipe(tmp_path / "user")
    code, out, error = call(capsys, "run", path, "--out", tmp_path / "out", "--set", "stages.1.epochs=1")
    assert code == 0
    for text in (
        "base",
        "train",
        "tune *",
        "accuracy",
        "p90 ms",
        "train: training changes values",
        f"bundle: {tmp_path / 'out' / 'bundle'}",
    ):
        assert text in out
    assert "train: starts" in error and "base: quality and cost" in error
    result = json.loads(next((tmp_path / "out" / "checkpoints").glob("02-*/result.json")).read_text())
    assert len(result["metrics"]["log"]) == 1


def test_quiet_says_nothing_but_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "user", stages=[])
    code, out, error = call(capsys, "run", path, "--out", tmp_path / "out", "--quiet")
    assert code == 0 and "dense" in out and error == ""


def test_results_go_to_build_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "user", stages=[])
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "run", path)[0] == 0
    assert (tmp_path / "build" / "recipe" / "run.json").is_file()


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.RecipeError, 2),
        (errors.StageOrderError, 2),
        (errors.DataError, 2),
        (errors.OutputError, 2),
        (errors.ParityError, 3),
        (errors.QualityFloorError, 4),
        (errors.StageError, 4),
        (errors.ProviderError, 5),
        (errors.EdgewrightError, 1),
        (ZeroDivisionError, 1),
        (KeyboardInterrupt, 130),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_exit_codes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
    code: int,
    debug: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("what [bold]happened[/bold] to /a/b/c")

    monkeypatch.setattr(runner, "run", fail)
    path = write_recipe(tmp_path / "user")
    found, out, error = call(capsys, "run", path, "--out", tmp_path / "out", *(["--debug"] if debug else []))
    assert found == code and out == ""
    assert ("Traceback" in error) == debug
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    if kind is KeyboardInterrupt:
        assert "run the same command again to go on where it was" in line
    else:
        assert "what [bold]happened[/bold] to /a/b/c" in line


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["run", "none.yaml"], "there is no recipe none.yaml"),
        (["run", "RECIPE", "--set", "sed=1"], "did you mean 'seed'?"),
        (["run", "RECIPE", "--set", "stages.0.epoch=1"], "did you mean 'stages.0.epochs'?"),
        (["run", "RECIPE", "--out", "/proc/none"], "cannot be written"),
        (["run", "RECIPE", "--outt", "x"], "No such option"),
        (["cuts", "zoo:nothing_like_it"], "unknown model"),
        (["cuts", "python:net.py:net"], "net.py"),
        (["cuts", "zoo:vgg16", "--input-shape", "1,a"], "no list of positive numbers"),
        (["cuts", "zoo:vgg16", "--input-shape", "1,5,32,32"], "does not run on inputs of shape [1, 5, 32, 32]"),
        (["verify", "no_bundle"], "no_bundle"),
        (["nothing"], "No such command"),
    ],
)
def test_bad_input_is_exit_code_two(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    wanted: str,
) -> None:
    path = write_recipe(tmp_path / "user")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    code, _, error = call(capsys, *[str(path) if a == "RECIPE" else a for a in arguments])
    assert code == 2 and wanted in error and "Traceback" not in error


def test_models_lists_names_that_recipes_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(capsys, "models", "zoo:")
    assert code == 0 and "zoo:vgg16" in out and "3x32x32" in out and "torchvision" not in out


def test_cuts_of_a_recipe_use_its_model_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = write_recipe(tmp_path / "user", model={"name": "python:net.py:net", "args": {"width": 8}})
    code, out, _ = call(capsys, "cuts", path)
    assert code == 0
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["1", "ReLU"])
    assert row == ["1", "ReLU", "8", "40", "62.5%"]  # 5 x 8 of 5 x 8 + 8 x 3
    assert "whole model: 64 MACs, 75 parameters" in out


def test_cuts_of_a_model_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, error = call(capsys, "cuts", "python:net.py:net")
    assert code == 2 and "--input-shape" in error
    code, out, _ = call(capsys, "cuts", "python:net.py:net", "--input-shape", "1,5", "--set", "model.args.width=10")
    assert code == 0 and "whole model: 80 MACs" in out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    assert code == 0 and json.loads(out) == json_schema()


@pytest.mark.parametrize("command", ["verify", "predict", "bench", "doctor"])
def test_device_commands_are_the_runtimes_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from edgewright.edge_runtime import cli as device

    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and "--json FILE" in out
    given: list[list[str]] = []
    monkeypatch.setattr(device, "main", lambda arguments, program: given.append([program, *arguments]) or 5)
    code, _, _ = call(capsys, command, "a bundle", "--threads", "2", "--provider=cuda", "-x")
    assert code == 5 and given == [["edgewright", command, "a bundle", "--threads", "2", "--provider=cuda", "-x"]]


def test_shipped_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "RECIPES", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path / "shipped")
    assert cli._recipe_path("recipe") == path
    assert cli._recipe_path("./recipe") == Path("recipe")
    (tmp_path / "recipe").write_text("mine")
    assert cli._recipe_path("recipe") == Path("recipe")
