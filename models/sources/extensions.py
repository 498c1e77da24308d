"""What other packages offer by entry points: stages, tasks and models of theirs, by name.

A package declares them in its pyproject.toml; nothing of it is imported before a recipe names it, and one that
cannot be imported says so then.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any


@functools.cache
def offered(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """The entry points of `group` by name; several packages may offer one name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def load(group: str, name: str) -> Any:
    """The object behind the entry point `name` of `group`.

    Raises:
        ValueError: two packages offer it, or it cannot be imported; names the package and the cause.
    """
    points = offered(group)[name]
    if len({point.value for point in points}) > 1:
        raise ValueError(f"{name!r} is offered twice, by {where(group, name)}: uninstall one of them")
    try:
        return points[0].load()
    except Exception as error:  # another package's import may raise anything, and the user has to know which
        raise ValueError(
            f"{name!r} ({where(group, name)}) cannot be imported: {type(error).__name__}: {error}; repair that "
            "package, or uninstall it"
        ) from error


def where(group: str, name: str) -> str:
    """Which packages offer `name`, for errors."""
    return " and ".join(sorted({f"{point.value} of {_package(point)}" for point in offered(group)[name]}))


def top_module(group: str, name: str) -> str:
    """The package, or the single module, that an entry point comes from."""
    return offered(group)[name][0].module.partition(".")[0]


def files_of(group: str, name: str) -> tuple[Path, ...]:
    """Every Python file of the package that an entry point comes from, sorted; for cache keys."""
    spec = importlib.util.find_spec(top_module(group, name))
    if spec is None:
        return ()
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    if not folders and spec.origin is not None:
        files.add(Path(spec.origin).resolve())
    return tuple(sorted(files))


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
