"""Exits for batches: rows that are decided leave before the next level (DESIGN §4 rule 9).

Like `control_flow`, with nested `If`s whose condition is that nobody is left::

    level k for n rows -> head k -> policy -> decided [n]
    alive = NonZero(Not decided) [m];  every value that deeper levels read: Gather(value, alive) along its row axis
    If m == 0
       then: the scores and exit indices of this level
       else: level k+1 for m rows, ... ; ScatterND of its scores and exit indices into those of this level

So a level runs with the rows that need it, and not at all where there are none; a batch without rows is the same case.
The gathers stand in front of the `If`: no branch reads an input of the graph directly, which costs a copy on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, SCORES

from ..graph.capture import MODULE_KEY
from ..graph.simplify import Feeds
from .branch_layout import block_captured_maps
from .control_flow import TakenApart, complete_main, exit_branch, take_apart, threshold_values
from .crossing import RowCrossing
from .policy_graph import PolicyGraphs, splice
from .weight_placement import Placement, place_initializers

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def compact(
    model: ir.Model,
    policy: PolicyGraphs,
    thresholds: Sequence[float],
    feeds: Sequence[Feeds],
    placement: Placement = "bytes",
) -> tuple[ir.Model, tuple[str, ...]]:
    """Turns the flat graph of a network with K exits into levels that run with the rows that need them.

    Args:
        model: flat, with a dynamic batch axis, outputs ``logits.0`` ... ``logits.K``; not changed.
        policy: captured for any number of rows.
        thresholds: K numbers for the `thresholds` initializer.
        feeds: two example inputs with different numbers of rows, to find the row axis of every value.
        placement: see `place_initializers`.

    Returns:
        A model with outputs label int64 [N], scores float32 [N, C], exit_index int64 [N], and notes for the manifest.

    Raises:
        ExportError: a value that crosses a level has its rows folded into another axis; names it.
    """
    apart = take_apart(model)
    exits = len(apart.logits) - 1
    counts = {k: _value(f"exits.{k - 1}/rows_left", _INT64, [1]) for k in range(1, exits + 1)}
    builder = _Builder(policy, apart, RowCrossing(apart, model, feeds, counts), counts)
    main = builder.main(thresholds)
    notes = place_initializers(main, builder.level_graphs, apart.initializers, builder.level, placement)
    return apart.model_of(main), notes


class _Builder:
    """Assembles the nested graphs, the outermost level first."""

    def __init__(
        self, policy: PolicyGraphs, apart: TakenApart, crossing: RowCrossing, counts: Mapping[int, ir.Value]
    ) -> None:
        self.policy, self.apart, self.counts = policy, apart, counts
        self.exits = len(apart.logits) - 1
        self.level_graphs: dict[int, ir.Graph] = {}
        logits = policy.first.graph.inputs[0].shape
        assert logits is not None and isinstance(logits[1], int)
        self.classes = logits[1]
        self.axis, self.readers = crossing.axis, crossing.readers
        self.by_level, self.level = crossing.by_level, crossing.level
        shapes = [v.shape for v in apart.inputs if v.shape is not None]
        self.batch = str(shapes[0][0])
        self.other_axes = {str(size) for shape in shapes for size in shape[1:]}

    def main(self, thresholds: Sequence[float]) -> ir.Graph:
        stored, split = threshold_values(thresholds)
        self.thresholds = list(split.outputs)
        graph = self._level(0, [])
        for value, name in zip(graph.outputs, (SCORES, EXIT_INDEX), strict=True):
            value.name = name
        complete_main(graph, self.apart.inputs, stored, split)
        return graph

    def _level(self, k: int, memory: Sequence[ir.Value]) -> ir.Graph:
        """The graph of level k with everything nested below it; outputs scores [n, C] and exit_index [n]."""
        nodes = list(self.by_level[k])
        logits = self.apart.logits[k]
        if k == self.exits:
            (scores,) = splice(self.policy.finish, [logits, *memory], nodes, "exits.final")
            self._relabel(nodes, k)
            answer = [scores, _exit_index(k, self.counts[k], self._rows(k), nodes)]
            graph = ir.Graph([], answer, nodes=nodes, name="final")
        else:
            source = self.policy.next if memory else self.policy.first
            decided, scores, *memory = splice(source, [logits, self.thresholds[k], *memory], nodes, f"exits.{k}")
            self._relabel(nodes, k)
            count = _add(nodes, "Shape", [decided], f"exits.{k}/Shape", _INT64, [1])
            exit_index = _exit_index(k, count, self._rows(k), nodes)
            alive, nobody = self._undecided(k, decided, nodes)
            left = [self._gather(v, alive, 0, k, nodes) for v in memory]
            self._gather_crossing(k, alive, nodes)
            answer = self._merge(k, nobody, alive, [scores, exit_index], self._level(k + 1, left), nodes)
            graph = ir.Graph([], answer, nodes=nodes, name="main" if k == 0 else f"level{k}")
        self.level_graphs[k] = graph
        if k > 0:
            block_captured_maps(graph, self.by_level[k])
        return graph

    def _rows(self, k: int) -> str:
        """Name of the row axis of level k: the batch's own, or what exit k - 1 leaves of it."""
        return self.batch if k == 0 else f"{self.batch}_after_exit{k - 1}"

    def _relabel(self, nodes: Sequence[ir.Node], k: int) -> None:
        """Symbolic sizes of level k: equal names must mean equal sizes, and every level has fewer rows."""
        for node in nodes:
            for value in node.outputs:
                if value.shape is not None:
                    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
                    value.shape = ir.Shape([self._size(size, k) for size in sizes])

    def _size(self, size: int | str, k: int) -> int | str | None:
        if isinstance(size, int) or size in self.other_axes:
            return size
        return self._rows(k) if size == self.batch else None

    def _undecided(self, k: int, decided: ir.Value, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
        """Numbers of the rows that stay, int64 [m], and whether there are none, bool [1]."""
        prefix, left = f"exits.{k}", self._rows(k + 1)
        stays = _add(nodes, "Not", [decided], f"{prefix}/Not", _BOOL, [self._rows(k)])
        found = _add(nodes, "NonZero", [stays], f"{prefix}/NonZero", _INT64, [1, left])
        alive = _add(
            nodes, "Reshape", [found, _numbers(nodes, f"{prefix}/flat", [-1])], f"{prefix}/alive", _INT64, [left]
        )
        nodes.append(ir.node("Shape", [alive], outputs=[self.counts[k + 1]], name=f"{prefix}/rows_left"))
        zero = _numbers(nodes, f"{prefix}/zero", [0])
        return alive, _add(nodes, "Equal", [self.counts[k + 1], zero], f"{prefix}/nobody", _BOOL, [1])

    def _gather_crossing(self, k: int, alive: ir.Value, nodes: list[ir.Node]) -> None:
        """Hands every value that deeper levels read on to them, without the rows that have left."""
        for value, readers in self.readers.items():
            maker = value.producer()
            deeper = [(node, index) for node, index, level in readers if level > k]
            if not deeper or (maker is not None and self.level[maker] > k):
                continue
            # what the level before this one has handed on, or the value itself
            current = deeper[0][0].inputs[deeper[0][1]]
            assert current is not None
            kept = self._gather(current, alive, self.axis[value], k, nodes)
            for node, index in deeper:
                node.replace_input_with(index, kept)

    def _gather(self, value: ir.Value, alive: ir.Value, axis: int, k: int, nodes: list[ir.Node]) -> ir.Value:
        shape: list[int | str | None] | None = None
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
            shape = [self._rows(k + 1) if i == axis else self._size(size, k) for i, size in enumerate(sizes)]
        stem = (value.name or "").split("@rows")[0]
        return _add(nodes, "Gather", [value, alive], f"{stem}@rows{k + 1}", value.dtype, shape, {"axis": axis})

    def _merge(
        self,
        k: int,
        nobody: ir.Value,
        alive: ir.Value,
        own: Sequence[ir.Value],
        deeper: ir.Graph,
        nodes: list[ir.Node],
    ) -> list[ir.Value]:
        """The answers of level k for all its rows: its own, with those of deeper levels in the places of their rows."""
        prefix, rows = f"exits.{k}", self._rows(k)
        shapes: list[list[int | str | None]] = [[rows, self.classes], [rows]]
        names = ("scores", "exit_index")
        leaving: list[ir.Node] = []
        then = [
            _add(leaving, "Identity", [value], f"{prefix}/{name}", value.dtype, shape)
            for value, name, shape in zip(own, names, shapes, strict=True)
        ]
        merging: list[ir.Node] = []
        column = _numbers(merging, f"{prefix}/column", [-1, 1])
        places = _add(merging, "Reshape", [alive, column], f"{prefix}/places", _INT64, [self._rows(k + 1), 1])
        merged = [
            _add(merging, "ScatterND", [value, places, found], f"{prefix}/merged_{name}", value.dtype, shape)
            for value, found, name, shape in zip(own, deeper.outputs, names, shapes, strict=True)
        ]
        deeper.extend(merging)
        deeper.outputs.clear()
        deeper.outputs.extend(merged)
        leave = ir.Graph([], then, nodes=leaving, name=f"exit{k}_all_leave")
        branch = exit_branch(k, nobody, leave, deeper, [f"exit{k}/{name}" for name in names])
        nodes.append(branch)
        return list(branch.outputs)


def _value(name: str, dtype: ir.DataType | None, shape: Sequence[int | str | None] | None) -> ir.Value:
    assert dtype is not None
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def _add(
    nodes: list[ir.Node],
    kind: str,
    inputs: Sequence[ir.Value],
    name: str,
    dtype: ir.DataType | None,
    shape: Sequence[int | str | None] | None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Appends a node with one output, both called `name`; returns the output."""
    output = _value(name, dtype, shape)
    properties = {MODULE_KEY: ""}
    nodes.append(ir.node(kind, inputs, attributes, outputs=[output], name=name, metadata_props=properties))
    return output


def _numbers(nodes: list[ir.Node], name: str, values: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(np.asarray(values, dtype=np.int64))
    return _add(nodes, "Constant", [], name, _INT64, [len(values)], {"value": tensor})


def _exit_index(k: int, count: ir.Value, rows: str, nodes: list[ir.Node]) -> ir.Value:
    """int64 [n], all k, for n = `count` rows."""
    value = {"value": ir.tensor(np.asarray([k], dtype=np.int64))}
    return _add(nodes, "ConstantOfShape", [count], f"exits.{k}/index", _INT64, [rows], value)
