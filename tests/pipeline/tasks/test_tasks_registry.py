"""Tasks by name, and what is said about a user's task that does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_task

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks import available, build_task, task_sources
from edgewright.pipeline.tasks import registry as under_test

USER = """
import torch
from edgewright.pipeline.tasks.image_classification import ImageClassification
from where import FOLDER

def mine(rows: int = 8, path: str = "", data_path: str = "", url_path: str = "http://x/y"):
    if rows == 0:
        raise FileNotFoundError("no rows here")
    x, y = torch.randn(rows, 1, 4, 4), torch.arange(rows) % 2
    if rows == 3:
        x[1, 0, 0, 0] = float("nan")
    task = ImageClassification({"train": (x, y)}, ["a", "b"], name=str([path, data_path, url_path]))
    return task if rows != 5 else {"train": (x, y)}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "where.py").write_text("FOLDER = 'here'\n")
    return tmp_path


def test_a_users_task_gets_its_arguments_and_places(root: Path) -> None:
    task = build_task("python:mine.py:mine", {"rows": 6, "path": "data", "data_path": "/abs"}, root)
    assert len(task.splits["train"]) == 6
    assert task.name == str([str(root / "data"), "/abs", "http://x/y"])
    assert task_sources("python:mine.py:mine", root) == (root / "mine.py", root / "where.py")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("python:mine.py:mine", {"row": 3}, r"task: python:mine.py:mine has no argument 'row' \(did you mean 'rows'"),
        ("python:mine.py:minee", {}, "has no 'minee'"),
        ("python:your.py:mine", {}, r"there is no file .*your.py"),
        ("python:mine.py:mine", {"rows": 0}, r"failed in .*mine.py, line 8: FileNotFoundError: no rows here"),
        ("python:mine.py:mine", {"rows": 3}, "^sample 1 of input 0 holds NaN"),
        ("python:mine.py:mine", {"rows": 5}, "returned a dict without 'name'"),
        ("image_foldr", {}, r"unknown task 'image_foldr' \(did you mean 'image_folder'"),
        ("image_folder", {}, "the task 'image_folder' cannot be made: .* needs the argument 'path'"),
        ("image_folder", {"path": "x", "sise": 3}, r"no argument 'sise' \(did you mean 'size'"),
        ("image_folder", {"path": "x"}, "there is no folder .*x"),
        ("augmentation", {}, "unknown task 'augmentation'"),
    ],
)
def test_what_cannot_be_made_says_why(root: Path, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_task(name, args, root)


def copy_of(task: Any, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**{name: getattr(task, name) for name in under_test.TASK_ATTRIBUTES}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "the task has no labels"),
        ({"dynamic_axes": ()}, "has 1 input_names and 0 dynamic_axes"),
        ({"splits": {}}, "splits are no mapping"),
        ({"splits": {"trian": torch.ones(1)}}, r"unknown split 'trian' \(did you mean 'train'"),
        ({"splits": {"train": torch.ones(1)}}, "the split 'train' is a Tensor without 'targets'; wrap it in"),
    ],
)
def test_a_result_that_is_no_task(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        under_test._check_task(copy_of(tiny_task(), **changes), "python:x.py:y")


def test_each_missing_attribute_is_named() -> None:
    whole = copy_of(tiny_task())
    under_test._check_task(whole, "python:x.py:y")
    for name in vars(whole):
        part = SimpleNamespace(**{key: value for key, value in vars(whole).items() if key != name})
        with pytest.raises(DataError, match=f"without {name!r}"):
            under_test._check_task(part, "python:x.py:y")


CLASSIFIED_IMAGES = {"cifar", "digits", "fashion_mnist", "glyphs", "image_folder"}


def test_shipped_tasks_are_found_by_their_modules() -> None:
    names = available()
    assert "image_folder" in names and "registry" not in names and "augmentation" not in names
    for name in names:
        sources = task_sources(name, Path())
        files = {path.name for path in sources}
        of_images = {"augmentation.py", "splitting.py", "preprocess.py"} if name in CLASSIFIED_IMAGES else set()
        of_images |= {"image_file.py"} if name == "image_folder" else set()
        assert {f"{name}.py", "task.py", *of_images} <= files
        assert not files & {"cost.py", "runner.py", "residual.py"}
        others = {path.stem for path in sources if path.parent.name == "shipped"} & set(names) - {name}
        assert others == ({"image_folder"} if name == "embedding" else set())
