"""Files that are edited while a run is at work: nothing may be stored under the key of the version before."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_on_disk import MODEL, TASK, without_later_phases, write_recipe
from safetensors.torch import save_file

from edgewright.models.sources import python_source
from edgewright.models.sources.python_source import load_object
from edgewright.models.sources.user_modules import EditedError, imports_held
from edgewright.pipeline import sources
from edgewright.pipeline.errors import EditedSourceError
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.runs import preparation, runner
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.runs.watch import Watch
from edgewright.pipeline.store.checkpoint import load_checkpoint
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.shipped.causal_lm import causal_lm
from edgewright.pipeline.tasks.shipped.image_folder import image_folder


def old(path: Path, text: str) -> Path:
    """A file that was written long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (1e9, 1e9))
    return path


class TestWatch:
    def test_an_edit_is_named(self, tmp_path: Path) -> None:
        watch, path = Watch({}), old(tmp_path / "net.py", "a")
        assert watch.digests([path], tmp_path) == sources.file_digests([path], tmp_path)
        watch.check()
        path.write_text("b")
        with pytest.raises(EditedSourceError, match=r"net\.py was edited while the run was at work"):
            watch.check()
        path.write_text("a")
        watch.check()
        path.unlink()
        with pytest.raises(EditedSourceError, match=r"net\.py has gone"):
            watch.check()

    def test_a_source_of_equal_size_and_time_is_read(self, tmp_path: Path) -> None:
        watch, path = Watch({}), old(tmp_path / "net.py", "a")
        watch.digests([path], tmp_path)
        old(path, "b")
        with pytest.raises(EditedSourceError):
            watch.check()

    def test_what_is_in_memory_is_held_to_what_the_key_says(self, tmp_path: Path) -> None:
        path = old(tmp_path / "net.py", "a")
        with pytest.raises(EditedSourceError, match=r"net\.py"):
            Watch({path.resolve(): "another"}).digests([path], tmp_path)

    def test_a_second_preparation_sees_the_same_files(self, tmp_path: Path) -> None:
        watch, path = Watch({}), old(tmp_path / "weights.bin", "a")
        watch.digest(path)
        assert watch.digest(path) == sources.sha256_of(path)
        path.write_text("b")
        with pytest.raises(EditedSourceError, match=r"weights\.bin"):
            watch.digest(path)

    def test_settled_files_are_not_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, read = old(tmp_path / "weights.bin", "a"), list[Path]()
        real = sources.sha256_of
        monkeypatch.setattr("edgewright.pipeline.runs.watch.sha256_of", lambda path: read.append(path) or real(path))
        monkeypatch.setattr("edgewright.pipeline.runs.watch.own_sources", dict)
        clock = iter(range(0, 10**12, 10))
        # seconds, ahead of the file's change time
        start = time.time_ns()
        monkeypatch.setattr("edgewright.pipeline.runs.watch.time.time_ns", lambda: start + next(clock) * 10**9)
        next(clock)
        watch = Watch({})
        watch.digest(path)
        watch.check()
        assert len(read) == 1
        old(path, "b")
        with pytest.raises(EditedSourceError):
            watch.check()

    def test_our_own_sources_count(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        ours = old(tmp_path / "stage.py", "a")
        monkeypatch.setattr("edgewright.pipeline.runs.watch.own_sources", lambda: {ours: sources.sha256_of(ours)})
        Watch({}).check()
        monkeypatch.setattr("edgewright.pipeline.runs.watch.own_sources", lambda: {ours: "before"})
        with pytest.raises(EditedSourceError, match=r"stage\.py, a file of edgewright"):
            Watch({}).check()


def test_the_digest_is_that_of_the_bytes_that_run(tmp_path: Path) -> None:
    # a compiled file of another text, with the time and the size of this one, must not be taken
    first, second = "def f():\n    return 1\n", "def f():\n    return 2\n"
    path = old(tmp_path / "fast.py", first)
    import py_compile

    py_compile.compile(str(path))
    old(path, second)
    with imports_held() as held:
        assert load_object("python:fast.py:f", tmp_path).object() == 2
        assert held[path] == sources.sha256_of(path)


@pytest.mark.parametrize("edited", ["net.py", "parts/__init__.py", "parts/block.py"])
def test_held_modules_are_imported_in_one_version_only(tmp_path: Path, edited: str) -> None:
    old(tmp_path / "net.py", "from parts.block import make\n")
    old(tmp_path / "parts/__init__.py", "")
    old(tmp_path / "parts/block.py", "def make():\n    return 1\n")
    before = (tmp_path / edited).read_text()
    with imports_held():
        assert load_object("python:net.py:make", tmp_path).object() == 1
        (tmp_path / edited).write_text(before + "\n# edited\n")
        with pytest.raises(EditedError, match=edited):
            load_object("python:net.py:make", tmp_path)
        (tmp_path / edited).write_text(before)
        assert load_object("python:net.py:make", tmp_path).object() == 1
    (tmp_path / edited).write_text(before + "\n# edited\n")
    assert load_object("python:net.py:make", tmp_path).object() == 1, "a new run begins with the file as it is"


def resolutions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose imports are looked for from now on, in order."""
    real, found = python_source.import_closure, list[str]()

    def watched(file: Path, *places: Any) -> tuple[Path, ...]:
        found.append(file.name)
        return real(file, *places)

    monkeypatch.setattr(python_source, "import_closure", watched)
    return found


def test_the_files_of_a_model_are_looked_for_once_while_imports_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(tmp_path / "net.py", "from block import make\n")
    old(tmp_path / "block.py", "def make():\n    return 1\n")
    found = resolutions(monkeypatch)
    with imports_held():
        for _ in range(3):
            assert {path.name for path in load_object("python:net.py:make", tmp_path).sources} == {"net.py", "block.py"}
        assert found == ["net.py"]
    old(tmp_path / "other.py", "")
    old(tmp_path / "net.py", "from block import make\nimport other\n")
    assert len(load_object("python:net.py:make", tmp_path).sources) == 3, "outside of a run they are looked for anew"


# runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, action: Callable[[], object]) -> None:
    """Does `action` before the `number`-th call of a function."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def watched(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            action()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, watched)


def test_a_run_looks_once_for_what_a_model_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None
) -> None:
    path = write_recipe(tmp_path / "user")
    found = resolutions(monkeypatch)
    run(path, tmp_path / "out")
    assert found == ["net.py", "data.py"], (
        "the model's, then the task's; it was at each look at either, and at each checkpoint"
    )
    # and the digests of what was found are still compared: see test_an_edited_model_is_never_stored


def stored(out: Path) -> list[str]:
    return sorted(path.name[:8] for path in (out / "checkpoints").glob("*"))


def sigmoid(folder: Path) -> None:
    (folder / "net.py").write_text(MODEL.replace("ReLU", "Sigmoid"))


def activations(out: Path) -> set[str]:
    return {
        type(module).__name__
        for path in (out / "checkpoints").glob("*")
        for module in load_checkpoint(path).modules()
        if type(module).__name__ in ("ReLU", "Sigmoid")
    }


PLACES = {
    "while the model is built": (preparation, "check_model", 1, []),
    "before the base is stored": (runner, "build_base", 1, []),
    "while a stage trains": (FolderContext, "save", 2, ["00-base-"]),
    "after the last stage": (runner, "measure", 1, ["00-base-", "01-train", "02-train"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_an_edited_model_is_never_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None, place: str
) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    owner, name, number, kept = PLACES[place]
    path = write_recipe(folder)
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, lambda: sigmoid(folder))
        with pytest.raises(EditedSourceError, match=r"net\.py was edited"):
            run(path, out)
    assert stored(out) == kept
    (folder / "net.py").write_text(MODEL)
    run(path, out)
    assert activations(out) == {"ReLU"}


def test_an_edit_that_is_taken_back_in_time_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None
) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    path = write_recipe(folder)
    at_call(monkeypatch, runner, "measure", 1, lambda: (sigmoid(folder), (folder / "net.py").write_text(MODEL)))
    run(path, out)
    assert activations(out) == {"ReLU"}


def test_an_edit_between_a_check_and_the_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None
) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    path = write_recipe(folder)
    at_call(monkeypatch, runner, "load_checkpoint", 1, lambda: sigmoid(folder))
    at_call(monkeypatch, FolderContext, "save", 1, lambda: (folder / "net.py").write_text(MODEL))
    with pytest.raises(EditedSourceError, match=r"net\.py was edited"):
        run(path, out)
    assert stored(out) == ["00-base-"]


@pytest.mark.parametrize("what", ["task", "weights"])
def test_an_edited_task_and_replaced_weights_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None, what: str
) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    path = write_recipe(folder, model={"name": "python:net.py:net", "weights": "w.safetensors"})
    state = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    save_file({name: torch.randn(shape) for name, shape in state.items()}, folder / "w.safetensors")

    def edit() -> None:
        if what == "task":
            (folder / "data.py").write_text(TASK.replace("4.0", "5.0"))
        else:
            save_file({name: torch.randn(shape) for name, shape in state.items()}, folder / "w.safetensors")

    at_call(monkeypatch, FolderContext, "save", 1, edit)
    with pytest.raises(EditedSourceError, match=r"data\.py" if what == "task" else r"w\.safetensors"):
        run(path, out)
    assert stored(out) == ["00-base-"]


@pytest.mark.slow
def test_the_controls_run_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    training = {"epochs": 1, "batch_size": 16}
    path = write_recipe(folder, stages=[], control={"argument": "width", "between": [2, 8], "training": training})
    at_call(monkeypatch, FolderContext, "save", 1, lambda: sigmoid(folder))
    with pytest.raises(EditedSourceError, match=r"net\.py was edited"):
        run(path, out)
    assert "01-train" not in stored(out)


def test_a_bundle_of_an_edited_model_is_not_taken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    path = write_recipe(folder, stages=[])
    at_call(monkeypatch, runner.bundles, "is_current", 1, lambda: sigmoid(folder))
    with pytest.raises(EditedSourceError, match=r"net\.py was edited"):
        run(path, out)
    assert not (out / "bundle").exists()


# data ----------------------------------------------------------------------------------------------------------------


def pictures(folder: Path, shade: int = 0) -> Path:
    generator = np.random.default_rng(shade)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(10):
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / label / f"{i}.png")
    return folder


def test_a_picture_that_is_replaced_is_named_where_it_is_read_and_where_results_are_stored(tmp_path: Path) -> None:
    task = image_folder(pictures(tmp_path / "photos"), size=8)
    watch = Watch({})
    watch.data(task)
    split = task.splits["train"]
    split.batch([0, 1])
    file = split.files[3]  # type: ignore[attr-defined]
    before = file.read_bytes()
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(EditedSourceError, match=file.name):
        split.batch([3])
    with pytest.raises(EditedSourceError, match=file.name):
        watch.check()
    file.write_bytes(before)
    split.batch([3])
    watch.check()


def test_an_edited_text_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(400))))
    task, watch = causal_lm(str(text), tokenizer="bytes", window=16), Watch({})
    watch.data(task)
    watch.check()
    text.write_text(" ".join(map(str, range(1, 401))))
    with pytest.raises(EditedSourceError, match=r"text\.txt"):
        watch.check()


READS = MODEL.replace("def net(width=6, classes=3):", "def net(classes=3):\n    width = json.load(open('width.json'))")


def _with_a_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_recipe(folder, stages=[{"name": "train", "epochs": 2, "batch_size": 16}])
    (folder / "net.py").write_text("import json\n" + READS)
    (folder / "width.json").write_text("6")
    monkeypatch.chdir(folder)
    return path


def test_a_file_that_the_model_reads_is_a_source_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None
) -> None:
    path, out = _with_a_configuration(tmp_path / "user", monkeypatch), tmp_path / "out"
    with monkeypatch.context() as patch:
        at_call(patch, FolderContext, "save", 1, lambda: (tmp_path / "user" / "width.json").write_text("7"))
        with pytest.raises(EditedSourceError, match=r"width\.json was edited"):
            run(path, out)
    assert stored(out) == ["00-base-"]
    assert run(path, out).steps[-1].parameters == 5 * 7 + 7 + 7 * 3 + 3, "the file as it is, and no old base"
    (folder,) = list((out / "checkpoints").glob("01-*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(folder, tmp_path / "user")
    (tmp_path / "user" / "width.json").write_text("7\n")
    with pytest.warns(UserWarning, match=r"width\.json changed since"):
        load_checkpoint(folder, tmp_path / "user")


def test_arrays_that_a_users_task_reads_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages_only: None
) -> None:
    folder, out = tmp_path / "user", tmp_path / "out"
    path = write_recipe(folder)
    read = f"    import numpy as np\n    data = {{'n': np.load({str(folder / 'x.npy')!r})}} and {{}}"
    text = TASK.replace("    data = {}", read)
    (folder / "data.py").write_text(text)
    np.save(folder / "x.npy", np.zeros(4))
    at_call(monkeypatch, FolderContext, "save", 1, lambda: np.save(folder / "x.npy", np.ones(4)))
    with pytest.raises(EditedSourceError, match=r"x\.npy was edited"):
        run(path, out)
    assert stored(out) == ["00-base-"]


def test_pictures_and_weights_are_no_sources_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "user"
    path = write_recipe(folder, task={"name": "image_folder", "args": {"path": "photos", "size": 8, "memory_mb": 0}})
    pictures(folder / "photos")
    net = "import torch\nfrom torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    (folder / "net.py").write_text(net)
    state = {"1.weight": torch.randn(2, 192), "1.bias": torch.randn(2)}
    torch.save(state, folder / "w.pt")
    given = load_recipe(path, ["model.weights=w.pt"])
    inputs = preparation.prepare(given)
    assert set(inputs.base_sources) == {"net.py"}
    assert inputs.base_key.digest == preparation.prepare(given).base_key.digest


def test_a_file_that_was_edited_after_it_was_read_is_named(tmp_path: Path) -> None:
    watch, path = Watch({}), old(tmp_path / "width.json", "7")
    watch.read({path: hashlib.sha256(b"6").hexdigest()}, tmp_path)
    with pytest.raises(EditedSourceError, match=r"width\.json"):
        watch.check()
