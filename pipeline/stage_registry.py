"""Stages by name: those that ship, in the order that recipes usually run them, and those of other packages.

Another package offers a stage by an entry point::

    [project.entry-points."edgewright.stages"]
    my_stage = "my_package.my_stage:STAGE"

Its name in recipes is the name of the entry point. A stage is imported when it is named; one that cannot be
imported is known by its name, and says why it cannot be used when a recipe asks for it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

from edgewright.models.sources import extensions

from .errors import RecipeError
from .stage import Requirement, Stage

GROUP = "edgewright.stages"
"""The group of entry points."""
SHIPPED: tuple[str, ...] = ("train", "class_aware_pruning", "basis_sharing", "early_exit")
"""The stages that ship, each a module or package of `pipeline.stages`, in the order that recipes usually run them."""
TRAINING = "train"
"""What trains a control."""


def stage_names() -> tuple[str, ...]:
    """Every stage that a recipe can name: those that ship, then those of other packages by name."""
    return (*SHIPPED, *sorted(extensions.offered(GROUP).keys() - set(SHIPPED)))


def stage_named(name: str) -> Stage[Any]:
    """The stage called `name`; its module is imported on first use.

    Raises:
        RecipeError: there is none, with the nearest name; or it is another package's and cannot be imported.
    """
    if name not in SHIPPED and name in extensions.offered(GROUP):
        return _loaded(name)
    if name not in SHIPPED:
        names = stage_names()
        close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"unknown stage {name!r}{hint} (there are: {', '.join(names)})")
    stage: Stage[Any] = importlib.import_module(stage_module(name)).STAGE
    return stage


def stage_module(name: str) -> str:
    """Full name of the module, or of the package, whose sources decide what the stage `name` does.

    A stage of another package counts with the whole of the package it comes from.
    """
    if name in SHIPPED:
        return f"edgewright.pipeline.stages.{name}"
    return extensions.top_module(GROUP, name)


def usable_stages() -> Iterator[Stage[Any]]:
    """Every stage that can be imported here."""
    for name in stage_names():
        try:
            yield stage_named(name)
        except RecipeError:
            if name in SHIPPED:
                raise


def requirements() -> dict[str, tuple[str, Requirement]]:
    """What ``require`` of a recipe may ask for beside the figures that every run has: the stage and what it says."""
    return {
        field: (stage.name, requirement)
        for stage in usable_stages()
        for field, requirement in stage.requirements.items()
    }


@functools.cache
def _loaded(name: str) -> Stage[Any]:
    try:
        stage = extensions.load(GROUP, name)
    except ValueError as error:
        raise RecipeError(f"the stage {error}") from error
    if not isinstance(stage, Stage) or stage.name != name:
        what = f"a Stage named {stage.name!r}" if isinstance(stage, Stage) else f"a {type(stage).__name__}"
        raise RecipeError(
            f"the entry point {name!r} ({extensions.where(GROUP, name)}) is {what}, not a Stage named {name!r}: "
            "correct it there"
        )
    return stage
