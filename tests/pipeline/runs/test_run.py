"""`run`: finished work is not redone, an interruption changes no byte, and bad input is found before any
compute."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_on_disk import without_later_phases, write_recipe
from safetensors.torch import save_file
from torch import nn

from edgewright.pipeline.errors import (
    DataError,
    EdgewrightError,
    InputError,
    ModelError,
    OutputError,
    ProviderError,
    StageError,
)
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.report.result import RunResult
from edgewright.pipeline.runs import runner
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.stage import Edit, StageResult, State
from edgewright.pipeline.stage_registry import stage_named
from edgewright.pipeline.store.checkpoint import load_checkpoint
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.store.output import LOCK_FILE, output_folder


@pytest.fixture(autouse=True)
def stages_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_export" not in request.fixturenames:
        without_later_phases(monkeypatch)


@pytest.fixture
def real_export() -> None:
    """Asks for the real phases."""


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that really ran, in order."""
    import dataclasses

    ran: list[str] = []
    real = stage_named

    def watched(name: str) -> Any:
        stage = real(name)

        def fit(*given: Any) -> Any:
            ran.append(name)
            return stage.fit(*given)

        return dataclasses.replace(stage, fit=fit)

    monkeypatch.setattr(runner, "stage_named", watched)
    return ran


class Lines:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def track(self, items: Any, description: str, total: int | None = None) -> Any:
        yield from items

    def say(self, text: str) -> None:
        self.lines.append(text)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def die_at_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th save from now on is the last thing that happens."""
    real, saves = FolderContext.save, iter(range(1, 10**6))

    def save(self: FolderContext, name: str, state: State) -> None:
        real(self, name, state)
        if next(saves) == number:
            raise Killed

    monkeypatch.setattr(FolderContext, "save", save)


def checkpoints(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted((out / "checkpoints").rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    result = run(write_recipe(tmp_path / "user"), tmp_path / "out")
    assert [row.step for row in result.steps] == ["base", "train", "tune"]
    assert [row.stage for row in result.steps] == ["base", "train", "train"]
    assert result.reference == "tune", "both trainings come before any compression"
    base, trained, tuned = result.steps
    assert trained.accuracy > base.accuracy and trained.accuracy > 0.7
    assert trained.accuracy == pytest.approx(np.mean(trained.per_class))
    assert trained.worst_class_accuracy == min(p for p in trained.per_class if p is not None)
    assert trained.validation_accuracy is not None
    assert base.macs == 5 * 6 + 6 * 3 and base.parameters == 5 * 6 + 6 + 6 * 3 + 3
    assert base.unique_weight_bytes == 4 * base.parameters
    assert [len(row.metrics.get("log", [])) for row in result.steps] == [0, 3, 3]
    assert "values, not structure" in trained.notes[0]
    model = load_checkpoint(result.out / tuned.checkpoint)
    assert isinstance(model, nn.Sequential)
    record = json.loads((result.out / "run.json").read_text())
    assert record["state"] == "finished" and record["root"] == str(tmp_path / "user")
    assert {"base", "train", "tune"} <= record["seconds"].keys()
    assert not list((result.out / "state").iterdir()), "state of finished stages is dropped"


def test_the_resolved_recipe_runs_the_same(tmp_path: Path, fits: list[str]) -> None:
    out = tmp_path / "out"
    run(write_recipe(tmp_path / "user", seed=3), out)
    resolved = load_recipe(out / "recipe.resolved.yaml")
    assert resolved == load_recipe(tmp_path / "user" / "recipe.yaml")
    run(resolved, out)
    assert fits == ["train", "train"]


def test_finished_work_is_not_redone(tmp_path: Path, fits: list[str]) -> None:
    path, out, lines = write_recipe(tmp_path / "user"), tmp_path / "out", Lines()
    first = run(path, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").rglob("*")}
    second = run(path, out, progress=lines)
    assert fits == ["train", "train"]
    assert {p: p.stat().st_mtime_ns for p in (out / "checkpoints").rglob("*")} == before
    assert second.steps == first.steps
    assert [line.split(",")[0] for line in lines.lines] == [
        "base: already done",
        "train: already done",
        "tune: already done",
    ]


@pytest.mark.slow
def test_two_folders_have_the_same_bytes(tmp_path: Path) -> None:
    run(write_recipe(tmp_path / "user"), tmp_path / "one")
    torch.manual_seed(99)
    np.random.seed(99)
    run(write_recipe(tmp_path / "elsewhere" / "user"), tmp_path / "deep" / "two")
    assert checkpoints(tmp_path / "one") == checkpoints(tmp_path / "deep" / "two")


@pytest.mark.slow
def test_a_changed_stage_redoes_itself_and_what_follows(tmp_path: Path, fits: list[str]) -> None:
    path, out, lines = write_recipe(tmp_path / "user"), tmp_path / "out", Lines()
    run(path, out)
    run(load_recipe(path, ["stages.1.epochs=2"]), out, progress=lines)
    assert fits == ["train"] * 3
    assert "tune: starts, because config.epochs: 3 -> 2" in lines.lines
    run(load_recipe(path, ["stages.0.epochs=2"]), out, progress=lines)
    assert fits == ["train"] * 5
    assert "tune: starts, because its input changed" in lines.lines
    run(path, out)
    assert fits == ["train"] * 5, "what an earlier recipe made is still there"


def test_changed_user_code_starts_from_the_base(tmp_path: Path, fits: list[str]) -> None:
    path, out, lines = write_recipe(tmp_path / "user"), tmp_path / "out", Lines()
    run(path, out)
    source = tmp_path / "user" / "net.py"
    source.write_text(source.read_text().replace("width=6", "width=7"))
    run(path, out, progress=lines)
    assert fits == ["train"] * 4
    assert "base: starts, because model_sources.net.py changed" in lines.lines


@pytest.mark.slow
def test_fresh_redoes_everything(tmp_path: Path, fits: list[str]) -> None:
    path, out = write_recipe(tmp_path / "user"), tmp_path / "out"
    run(path, out)
    before = checkpoints(out)
    run(path, out, fresh=True)
    assert fits == ["train"] * 4
    assert checkpoints(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_interrupted_at_any_epoch_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str], number: int
) -> None:
    path = write_recipe(tmp_path / "user")
    expected = run(path, tmp_path / "whole")
    fits.clear()
    with monkeypatch.context() as patch:
        die_at_save(patch, number)
        with pytest.raises(Killed):
            run(path, tmp_path / "out")
    lines = Lines()
    result = run(path, tmp_path / "out", progress=lines)
    assert checkpoints(tmp_path / "out") == checkpoints(tmp_path / "whole")
    assert result.steps == expected.steps
    # three saves a stage: from the fourth on the first stage was finished, and ran once only
    assert len(fits) == 3
    assert (lines.lines[1].startswith("train: already done")) == (number > 3)
    assert f"{'train' if number <= 3 else 'tune'}: goes on where it was interrupted" in lines.lines


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_that_goes_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "user")
    script = """
import os, sys
import pytest
import torch
from recipes_on_disk import without_later_phases
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.runs.runner import run
torch.set_num_threads(int(sys.argv[3]))
without_later_phases(pytest.MonkeyPatch())
real, saves = FolderContext.save, iter(range(1, 100))
def save(self, name, state):
    real(self, name, state)
    if next(saves) == 5:
        os._exit(137)
FolderContext.save = save
run(sys.argv[1], sys.argv[2])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [str(path), str(tmp_path / "out"), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 137, done.stderr
    run(path, tmp_path / "out")
    run(path, tmp_path / "whole")
    assert checkpoints(tmp_path / "out") == checkpoints(tmp_path / "whole")


def test_the_callers_random_states_are_left_alone(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    run(write_recipe(tmp_path / "user"), tmp_path / "out")
    assert draw() == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_weights_are_loaded_and_part_of_the_key(tmp_path: Path, fits: list[str]) -> None:
    path = write_recipe(tmp_path / "user", model={"name": "python:net.py:net", "weights": "w.safetensors"}, stages=[])
    weights = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).state_dict()
    save_file(weights, str(tmp_path / "user" / "w.safetensors"))
    result = run(path, tmp_path / "out")
    assert [row.step for row in result.steps] == ["dense"] and result.reference == "dense"
    loaded = load_checkpoint(result.out / result.steps[0].checkpoint).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    save_file({name: value + 1 for name, value in weights.items()}, str(tmp_path / "user" / "w.safetensors"))
    again = run(path, tmp_path / "out")
    assert again.steps[0].checkpoint != result.steps[0].checkpoint


def expect(error: type[EdgewrightError], wanted: str, work: Callable[[], RunResult]) -> None:
    with pytest.raises(error) as caught:
        work()
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        ({"model": "zoo:no_such_net"}, ModelError, "unknown model"),
        ({"model": "python:nets.py:net"}, ModelError, "nets.py"),
        ({"model": {"name": "python:net.py:net", "args": {"widht": 3}}}, ModelError, "width"),
        ({"model": {"name": "python:net.py:net", "args": {"classes": 4}}}, ModelError, "the task 'small' has 3 labels"),
        ({"model": {"name": "python:net.py:net", "weights": "no.pt"}}, ModelError, "there is no weights file"),
        ({"task": "no_such_task"}, DataError, "unknown task"),
        ({"task": {"name": "python:data.py:task", "args": {"bad": True}}}, DataError, "NaN"),
        ({"task": {"name": "python:data.py:task", "args": {"twice": True}}}, DataError, "must not overlap"),
        (
            {"task": {"name": "python:data.py:task", "args": {"splits": ["train", "validation"]}}},
            DataError,
            "no 'test' split, which the report needs",
        ),
        (
            {"task": {"name": "python:data.py:task", "args": {"splits": ["validation", "test"]}}},
            DataError,
            "no 'train' split, which stage 'train' needs",
        ),
    ],
)
def test_bad_input_is_found_before_any_compute(
    tmp_path: Path, fits: list[str], changes: dict[str, Any], error: type[InputError], wanted: str
) -> None:
    path, out = write_recipe(tmp_path / "user", **changes), tmp_path / "out"
    expect(error, wanted, lambda: run(path, out))
    assert fits == [] and not list(out.glob("checkpoints/*"))


def test_a_class_without_samples_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]) -> None:
    import dataclasses

    from edgewright.pipeline.runs import preparation

    real = stage_named
    monkeypatch.setattr(preparation, "stage_named", lambda name: dataclasses.replace(real(name), per_class=True))
    task = {"name": "python:data.py:task", "args": {"empty": True}}
    path = write_recipe(tmp_path / "user", task=task)
    expect(DataError, "class 'label1' has no sample in the 'train' split", lambda: run(path, tmp_path / "out"))
    assert fits == []


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("def net(): return (lambda: None)", "returned a function"),
        ("def net(): return __import__('torch').nn.LazyLinear(3)", "'weight' has no shape yet"),
        ("import torch\nclass net(torch.nn.Module):\n  def forward(self, x): return [x]", "returns a list"),
        ("import torch\nclass net(torch.nn.Module):\n  def forward(self, x): return x * float('nan')", "returns"),
        ("import torch\nclass net(torch.nn.Module):\n  def forward(self, x): return x[:, :3] / 0", "NaN or infinity"),
        ("import torch\ndef net(): return torch.nn.Linear(4, 3)", "does not run on the inputs"),
        ("import torch\ndef net(:", "not valid Python"),
    ],
)
def test_models_that_do_not_fit_the_task_are_refused(tmp_path: Path, source: str, wanted: str) -> None:
    path = write_recipe(tmp_path / "user")
    (tmp_path / "user" / "net.py").write_text(source)
    expect(ModelError, wanted, lambda: run(path, tmp_path / "out"))


def test_cuda_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_recipe(tmp_path / "user", device="cuda")
    expect(ProviderError, "finds no CUDA device", lambda: run(path, tmp_path / "out"))


def test_a_failing_stage_keeps_what_is_finished(tmp_path: Path, fits: list[str]) -> None:
    path, out = write_recipe(tmp_path / "user"), tmp_path / "out"
    expect(StageError, "lower learning_rate", lambda: run(load_recipe(path, ["stages.1.learning_rate=1e30"]), out))
    run(path, out)
    assert fits == ["train"] * 3


def test_a_stage_that_leaves_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    def fit(model: nn.Module, *_: Any) -> Any:
        next(model.parameters()).data[0] = float("nan")
        return dataclasses.replace(done, model=model)

    from edgewright.pipeline.stage import Edit, StageResult

    done = StageResult(nn.Identity(), Edit("train"))
    broken = dataclasses.replace(stage_named("train"), fit=fit)
    monkeypatch.setattr(runner, "stage_named", lambda name: broken)
    out = tmp_path / "out"
    expect(StageError, "train left NaN or infinity in '0.weight'", lambda: run(write_recipe(tmp_path / "u"), out))
    assert [path.name[:7] for path in (out / "checkpoints").iterdir()] == ["00-base"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_buffers_may_hold_infinity_and_no_nan(value: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, float(value)]))
    result = StageResult(model.train(), Edit("train"))
    if value == "inf":
        assert not runner._checked(result, "train").training
    else:
        expect(StageError, "train left NaN or infinity in 'mask'", lambda: runner._checked(result, "train"))


@pytest.mark.parametrize("what", ["recipe", "out", "weights"])
def test_a_path_that_is_no_text_is_refused_at_the_start(tmp_path: Path, fits: list[str], what: str) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    if what == "weights":
        (tmp_path / "user").mkdir()
        odd = tmp_path / "user" / odd.name
        save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
        (tmp_path / "w.safetensors").rename(odd)
    path = write_recipe(odd if what == "recipe" else tmp_path / "user")
    recipe = load_recipe(path)
    if what == "weights":
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": odd})})
    expect(InputError, "not UTF-8 text", lambda: run(recipe, odd if what == "out" else tmp_path / "out"))
    assert fits == [] and not (tmp_path / "out" / "checkpoints").exists()


def test_a_label_of_two_classes_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "user")
    data = tmp_path / "user" / "data.py"
    data.write_text(data.read_text().replace('f"label{i}"', '"cat"'))
    expect(DataError, "'cat' twice, for the classes 0 and 1", lambda: run(path, tmp_path / "out"))


def test_a_scripted_model_is_refused_before_anything_is_computed(tmp_path: Path, fits: list[str]) -> None:
    path = write_recipe(tmp_path / "user")
    net = tmp_path / "user" / "net.py"
    net.write_text(net.read_text().replace("nn.ReLU()", "torch.jit.script(nn.ReLU())"))
    expect(ModelError, "the module '1' is TorchScript", lambda: run(path, tmp_path / "out"))
    assert fits == []


class TestOutput:
    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        try:
            expect(OutputError, "cannot be written", lambda: run(write_recipe(tmp_path / "u"), tmp_path / "out"))
        finally:
            tmp_path.chmod(0o700)

    def test_places_that_cannot_be_written(self, tmp_path: Path, fits: list[str]) -> None:
        path = write_recipe(tmp_path / "user")
        (tmp_path / "file").write_text("x")
        for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no/such")):
            expect(OutputError, "cannot be written", lambda out=out: run(path, out))  # type: ignore[misc]
        assert fits == [] and (tmp_path / "file").read_text() == "x"

    def test_something_else_where_the_bundle_goes(self, tmp_path: Path, fits: list[str]) -> None:
        (tmp_path / "out" / "bundle").mkdir(parents=True)
        (tmp_path / "out" / "bundle" / "precious.txt").write_text("x")
        expect(OutputError, "is in the way", lambda: run(write_recipe(tmp_path / "user"), tmp_path / "out"))
        assert fits == []

    def test_two_runs_do_not_mix(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "out"):
            expect(
                OutputError,
                f"in use by process {os.getpid()}",
                lambda: run(write_recipe(tmp_path / "user"), tmp_path / "out"),
            )
        run(write_recipe(tmp_path / "user"), tmp_path / "out")

    def test_the_lock_of_a_dead_process_locks_nothing(self, tmp_path: Path) -> None:
        child = multiprocessing.get_context("fork").Process(target=_die_with_lock, args=(tmp_path / "out",))
        child.start()
        child.join()
        assert child.exitcode == 9
        assert (tmp_path / "out" / LOCK_FILE).read_text() == f"process {child.pid}"
        with output_folder(tmp_path / "out"):
            assert (tmp_path / "out" / LOCK_FILE).read_text() == f"process {os.getpid()}"


def _die_with_lock(out: Path) -> None:
    with output_folder(out):
        os._exit(9)


@pytest.mark.slow
@pytest.mark.usefixtures("real_export")
def test_a_finished_bundle_is_not_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]
) -> None:
    import edgewright.export as export_room

    exported: list[str] = []
    real = export_room.export_bundle

    def watched(*given: Any, **named: Any) -> Any:
        exported.append(Path(given[2]).name)
        return real(*given, **named)

    monkeypatch.setattr(export_room, "export_bundle", watched)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)
    path, out = write_recipe(tmp_path / "user", stages=[]), tmp_path / "out"
    result = run(path, out)
    assert exported == ["bundle"] and fits == []
    assert result.steps[0].file_bytes == (out / "bundle" / "model.onnx").stat().st_size
    before = {p.name: p.read_bytes() for p in (out / "bundle").iterdir()}
    run(path, out)
    assert exported == ["bundle"]
    (out / "bundle" / "model.onnx").write_bytes(b"damaged")
    run(path, out)
    assert exported == ["bundle"] * 2
    assert {p.name: p.read_bytes() for p in (out / "bundle").iterdir()} == before
    run(load_recipe(path, ["export.tolerance.abs=1e-3"]), out)
    assert exported == ["bundle"] * 3
