"""What a library of models offers by name: a file for each library, a row in the table of `registry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelInfo:
    """One row of ``edgewright models``.

    Attributes:
        name: as recipes write it.
        description: one line.
        input_shape: of one row without the batch axis, as the default arguments expect it; None if not known.
    """

    name: str
    description: str
    input_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Library:
    """Models of another package, by what stands behind a prefix. Their code counts in cache keys by its version.

    Attributes:
        prefix: with its colon, ``timm:``.
        build: (name without the prefix, arguments) -> the model with fresh weights; ValueError if that cannot be.
        names: all that `build` takes, without the prefix; empty where the package is not installed.
        info: of one of `names`.
        summary: the one row that stands for all in a list that nobody has narrowed down; None lists each.
    """

    prefix: str
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    names: Callable[[], list[str]]
    info: Callable[[str], ModelInfo]
    summary: Callable[[], ModelInfo] | None = None
