"""Decides which of the nested graphs owns each initializer (DESIGN §4 rules 2 and 3).

ONNX Runtime gives a convolution its blocked layout only if the weight lies in the convolution's own graph, so an
initializer that one level reads lives in that level's branch. One that several levels read lives in the outermost of
them and is captured by the others, except that a convolution weight may be copied instead, where latency counts more
than bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import onnx_ir as ir

Placement: TypeAlias = Literal["bytes", "latency"]
"""What to pay for a convolution weight that several levels read: one outer copy and a slower convolution in the inner
levels (``bytes``), or one copy in each level (``latency``)."""

_SHAPE_BYTES = 64
"""Largest axes or shape that is copied into every level that reads it."""

LEVEL_MARK = "@level"
"""Stands in the name of the copy that a level has of its own, before the number of the level."""


def place_initializers(
    main: ir.Graph,
    level_graphs: Mapping[int, ir.Graph],
    initializers: Sequence[ir.Value],
    level: Mapping[ir.Node, int],
    placement: Placement,
) -> tuple[str, ...]:
    """Registers every initializer that is still read with the graph that owns it.

    Args:
        main: the outermost graph, level 0.
        level_graphs: level -> its graph, `main` under 0.
        initializers: those of the flat graph, owned by none at present.
        level: level of each node of the flat graph.
        placement: see `Placement`.

    Returns:
        A note for every convolution weight that several levels read.
    """
    notes: list[str] = []
    for value in initializers:
        users = [(node, index) for node, index in value.uses() if node in level]
        if not users:
            continue
        used = sorted({level[node] for node, _ in users})
        convolution = any(node.op_type == "Conv" and index == 1 for node, index in users)
        owner = main if used[0] == 0 else level_graphs[used[0]]
        owner.initializers[value.name or ""] = value
        if len(used) == 1:
            continue
        if _is_shape(value):
            _copy(value, used[1:], users, level_graphs, level)
        elif convolution and placement == "bytes":
            notes.append(
                f"convolution weight {value.name} is read by levels {used} and stored once: "
                "ONNX Runtime runs the inner ones without its blocked layout"
            )
        elif convolution:
            _copy(value, used[1:], users, level_graphs, level)
            notes.append(
                f"convolution weight {value.name} is read by levels {used} and stored {len(used)} times "
                "(shared_across_exits: latency); `bytes` would store it once"
            )
    return tuple(notes)


def _is_shape(value: ir.Value) -> bool:
    """Axes and shapes: a branch that captures them pays more than the few bytes of a copy."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.nbytes <= _SHAPE_BYTES


def _copy(
    value: ir.Value,
    into: Sequence[int],
    users: Sequence[tuple[ir.Node, int]],
    level_graphs: Mapping[int, ir.Graph],
    level: Mapping[ir.Node, int],
) -> None:
    for k in into:
        copy = ir.Value(
            name=f"{value.name}{LEVEL_MARK}{k}", type=value.type, shape=value.shape, const_value=value.const_value
        )
        level_graphs[k].initializers[copy.name or ""] = copy
        for node, index in users:
            if level[node] == k:
                node.replace_input_with(index, copy)
