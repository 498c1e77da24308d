"""Tasks by name: one that ships or that another package offers, ``python:package.module:function`` or
``python:path/to/file.py:function``.

A task ships by being a module of `shipped` that has a function of the module's own name. Another package offers one by
an entry point of the group ``edgewright.tasks``: a function whose keyword arguments are the task's ``args`` and that
returns a `Task`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from edgewright.models.sources import extensions
from edgewright.models.sources.python_source import PREFIX, call, check_arguments, did_you_mean, load_object, place_of

from ..errors import DataError, EdgewrightError
from ..metric import ClassScore
from ..sources import module_digests
from ..task import SPLITS, Task

_PACKAGE = f"{__package__}.shipped"
GROUP = "edgewright.tasks"
"""The group of entry points."""
TASK_ATTRIBUTES = (
    "name",
    "labels",
    "input_names",
    "dynamic_axes",
    "preprocessing",
    "provenance",
    "splits",
    "loss",
    "metric",
    "augment",
)
_SPLIT = ("targets", "sample_digests", "batch", "__len__")


def build_task(name: str, args: Mapping[str, Any], root: Path) -> Task:
    """Makes the task called `name`.

    Args:
        name: a task that ships, or ``python:...``.
        args: keyword arguments; a relative ``path`` (or ``*_path``) is taken from `root`.
        root: folder of the recipe.

    Raises:
        DataError: an unknown name, arguments that do not fit, a function that fails, or a result that is no
            `Task`.
    """
    placed = {key: _placed(key, value, root) for key, value in args.items()}
    if not name.startswith(PREFIX):
        function = _named(name)
        try:
            check_arguments(function, placed, f"the task {name!r}")
            made = function(**placed)
        except (TypeError, ValueError) as error:
            raise DataError(f"the task {name!r} cannot be made: {error}") from error
        if name in extensions.offered(GROUP):
            _check_task(made, f"the task {name!r}")
        return made
    try:
        check_arguments(load_object(name, root).object, placed, name)
    except ValueError as error:
        raise DataError(f"task: {error}") from error
    try:
        task = call(name, placed, root)
    except EdgewrightError:
        raise
    except Exception as error:
        raise DataError(f"the task {name} failed{place_of(error)}: {type(error).__name__}: {error}") from error
    _check_task(task, name)
    return cast("Task", task)


def task_sources(name: str, root: Path) -> tuple[Path, ...]:
    """Files whose content decides what `build_task` returns, for cache keys.

    Args:
        name: see `build_task`.
        root: folder of the recipe.

    Raises:
        DataError: an unknown name, or a reference that cannot be loaded.
    """
    if not name.startswith(PREFIX):
        if name not in shipped() and name in extensions.offered(GROUP):
            return extensions.files_of(GROUP, name)
        specs = map(importlib.util.find_spec, module_digests(_named(name).__module__))
        return tuple(sorted(Path(spec.origin).resolve() for spec in specs if spec and spec.origin))
    try:
        return load_object(name, root).sources
    except ValueError as error:
        raise DataError(f"task: {error}") from error


def available() -> list[str]:
    """Names of the tasks that ship, then of those that other packages offer."""
    names = shipped()
    return [*names, *sorted(extensions.offered(GROUP).keys() - set(names))]


def shipped() -> list[str]:
    """Names of the tasks that ship."""
    folder = importlib.import_module(_PACKAGE).__path__
    modules = [info.name for info in pkgutil.iter_modules(folder)]
    return [name for name in modules if callable(getattr(importlib.import_module(f"{_PACKAGE}.{name}"), name, None))]


def _named(name: str) -> Callable[..., Task]:
    if name not in shipped() and name in extensions.offered(GROUP):
        try:
            offered: Callable[..., Task] = extensions.load(GROUP, name)
        except ValueError as error:
            raise DataError(f"the task {error}") from error
        return offered
    names = available()
    if name not in names:
        raise DataError(
            f"unknown task {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}, and "
            "python:path/to/file.py:function names your own"
        )
    function: Callable[..., Task] = getattr(importlib.import_module(f"{_PACKAGE}.{name}"), name)
    return function


def _placed(key: str, value: Any, root: Path) -> Any:
    is_path = (key == "path" or key.endswith("_path")) and isinstance(value, str) and "://" not in value
    return str(root.resolve() / Path(value).expanduser()) if is_path else value


def _check_task(task: Any, name: str) -> None:
    """Holds what a user's function returned against the `Task` protocol."""
    missing = [attribute for attribute in TASK_ATTRIBUTES if not hasattr(task, attribute)]
    if missing:
        raise DataError(
            f"{name} returned a {type(task).__name__} without {missing[0]!r}; a task has {', '.join(TASK_ATTRIBUTES)}: "
            "return an ImageClassification, or see edgewright.pipeline.task.Task"
        )
    if not task.labels and isinstance(task.metric, ClassScore):
        raise DataError(f"{name}: the task has no labels; they name the classes, in the order of the logits")
    if len(task.dynamic_axes) != len(task.input_names):
        raise DataError(
            f"{name}: the task has {len(task.input_names)} input_names and {len(task.dynamic_axes)} "
            "dynamic_axes; each input needs one mapping, e.g. ({0: 'batch'},)"
        )
    if not isinstance(task.splits, Mapping) or not task.splits:
        raise DataError(f"{name}: the task's splits are no mapping of {', '.join(SPLITS)} to data")
    for key, split in task.splits.items():
        if key not in SPLITS:
            raise DataError(f"{name}: unknown split {key!r}{did_you_mean(str(key), list(SPLITS))}")
        absent = [attribute for attribute in _SPLIT if not hasattr(split, attribute)]
        if absent:
            raise DataError(
                f"{name}: the split {key!r} is a {type(split).__name__} without {absent[0]!r}; wrap it in "
                "TensorSplit or DatasetSplit of edgewright.pipeline.tasks.splits"
            )
