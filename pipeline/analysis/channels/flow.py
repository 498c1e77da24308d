"""What is known of a model's channels: which feed which, what a layer costs, which cannot be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from .apart import Care

Axis: TypeAlias = tuple[str, str]
"""(layer path, ``in`` | ``out``) or (name of a plain parameter or buffer, dimension as text)."""
OUTPUT: Axis = ("", "columns")
"""The columns of what the model answers, see `Columns`; read like a layer's input."""


@dataclass(frozen=True)
class Columns:
    """Where the columns of what a model returns lie: one number for each class at every place.

    Attributes:
        axis: that they lie along, of a float tensor [N, ...].
        of: the tensor in what the model returns; None if there is none.
        first: number of other columns before them.
    """

    axis: int = 1
    of: Callable[[Any], Tensor | None] = field(default=lambda output: output if isinstance(output, Tensor) else None)
    first: int = 0


OF_ONE_TENSOR = Columns()
"""Logits [N, classes, ...]."""


@dataclass(frozen=True)
class Call:
    """What one clean pass says about a mixing layer, over all its calls.

    Attributes:
        macs: multiply-accumulates of one row.
        positions: most output positions (pixels, tokens) of one call and row.
        dense: every output channel reads every input channel; else each reads a fixed number of them.
    """

    macs: int
    positions: int
    dense: bool = True


@dataclass
class Flow:
    """Where the output channels of every source arrive.

    Attributes:
        widths: channels of every axis seen.
        calls: mixing layers that ran.
        feeds: per source and reader axis: int64 [channels of the reader], the source channel, or -1 where it does not
            arrive.
        mixed: sources whose channels cannot be told apart at some reader, with the readers' paths.
        mixed_at: per such source: reader axis -> bool [channels], where several of its channels arrive.
        blocks: sources whose channels are mixed in blocks only, as those of attention heads: bool [channels] of each
            block, and per reader axis bool [channels] where the block arrives.
        outputs: sources that reach the model's output directly.
        opaque: layers with a forward of their own, whose channels are elsewhere than those of their type.
        along: axes of tensors that a layer has beyond those of its type -> the layer's axis that they go along with.
        decides: sources whose values become places or choices: the operation and the module, in words.
        foreign: operators of other libraries that the model calls.
        care: what marks are kept out of.
        stuck: axes of layers that cannot be narrowed, with the reason.
        training_only: layers of `calls` that run in training only, such as auxiliary heads.
    """

    widths: dict[Axis, int] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    feeds: dict[Axis, dict[Axis, Tensor]] = field(default_factory=dict)
    mixed: dict[Axis, str] = field(default_factory=dict)
    mixed_at: dict[Axis, dict[Axis, Tensor]] = field(default_factory=dict)
    blocks: dict[Axis, list[tuple[Tensor, dict[Axis, Tensor]]]] = field(default_factory=dict)
    outputs: set[Axis] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)
    along: dict[Axis, Axis] = field(default_factory=dict)
    decides: dict[Axis, str] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    care: Care = field(default_factory=Care)
    stuck: dict[Axis, str] = field(default_factory=dict)
    training_only: frozenset[str] = frozenset()
