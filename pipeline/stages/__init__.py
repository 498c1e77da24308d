"""The compression stages by name; each is a module (or package) of this folder with a `STAGE`."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from ..errors import RecipeError
from ..stage import Stage

STAGE_NAMES: tuple[str, ...] = ("train", "class_aware_pruning", "basis_sharing", "early_exit")
"""Every stage, in the order that recipes usually run them; the name is the name of the module."""


def stage_named(name: str) -> Stage[Any]:
    """The stage called `name`; its module is imported on first use.

    Raises:
        RecipeError: there is none, with the nearest name.
    """
    if name not in STAGE_NAMES:
        close = difflib.get_close_matches(str(name), STAGE_NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"unknown stage {name!r}{hint} (there are: {', '.join(STAGE_NAMES)})")
    stage: Stage[Any] = importlib.import_module(f"{__name__}.{name}").STAGE
    return stage


def stage_module(name: str) -> str:
    """Full name of the module that holds the stage `name`."""
    return f"{__name__}.{name}"
