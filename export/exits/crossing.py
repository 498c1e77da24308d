"""What levels read of the levels before them, and where its rows lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from ..graph.simplify import Feeds
from .control_flow import TakenApart
from .row_axes import LocalSizes, RowAxes, size_nodes

Readers: TypeAlias = dict[ir.Value, list[tuple[ir.Node, int, int]]]
"""Value -> (node, index of its input, level of the node) wherever a level reads what an outer one has."""


def crossing_values(apart: TakenApart) -> Readers:
    """Every value, inputs of the network included, that a level reads of an outer one."""
    readers: Readers = {}
    for k, nodes in enumerate(apart.by_level):
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                maker = value.producer()
                outer = apart.level[maker] < k if maker is not None else k > 0 and value in apart.inputs
                if outer:
                    readers.setdefault(value, []).append((node, index, k))
    return readers


class RowCrossing:
    """The crossing values of a graph for any number of rows; sizes computed from that number become each level's own.

    Attributes:
        axis: of every crossing value that has rows, the axis that counts them.
        readers: of the same values.
        by_level: the nodes of every level, those included that compute its own sizes.
        level: of all of these nodes.
    """

    def __init__(
        self, apart: TakenApart, model: ir.Model, feeds: Sequence[Feeds], counts: Mapping[int, ir.Value]
    ) -> None:
        """Measures and rewires.

        Args:
            apart: of `model`; readers of sizes are changed.
            model: flat, with a dynamic batch axis.
            feeds: two example inputs with different numbers of rows.
            counts: level -> int64 [1], the number of its rows; without level 0.

        Raises:
            ExportError: a value has its rows folded into another axis; names it.
        """
        crossing = crossing_values(apart)
        sizes = size_nodes((n for nodes in apart.by_level for n in nodes), apart.inputs)
        names = [v.name or "" for v in crossing]
        names += [
            v.name or "" for node in sizes for v in node.inputs if v is not None and node.op_type in ("Shape", "Size")
        ]
        axes = RowAxes(model, names, feeds)
        local = LocalSizes(sizes, axes, counts, apart.level)
        self.axis: dict[ir.Value, int] = {}
        self.readers: Readers = {}
        rewired: list[tuple[ir.Node, int, ir.Value]] = []
        for value, readers in crossing.items():
            if value.producer() in sizes:
                rewired += [(node, index, local.value(value, k)) for node, index, k in readers]
            elif (axis := axes.of(value)) is not None:
                self.axis[value], self.readers[value] = axis, readers
        # only now: a reader may be a size itself, which deeper levels compute again from what it read at first
        for node, index, own in rewired:
            node.replace_input_with(index, own)
        self.by_level = [[*local.added.get(k, []), *nodes] for k, nodes in enumerate(apart.by_level)]
        self.level = {node: k for k, nodes in enumerate(self.by_level) for node in nodes}
