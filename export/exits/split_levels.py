"""The levels of a network with exits as files of their own, run one after the other by a host (DESIGN, `split/`).

For targets where an `If` is slow, and where a CUDA graph, which takes no control flow, is to hold each level::

    split/level0.onnx   level 0 -> head 0 -> policy     -> decided, label, scores, what later levels read
    split/level1.onnx   level 1 -> head 1 -> policy     -> ...
    split/level2.onnx   the network's own end           -> label, scores

A file reads the values of earlier ones by the names that they have in `model.onnx`; the policy's memory is one of them.
The host takes the decided rows out of a batch between two files (`edge_runtime.split_session`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.edge_runtime.bundle.manifest import DECIDED, LABEL, SCORES, THRESHOLDS

from ..accounts.node_table import measured_values
from ..graph.capture import MODULE_KEY
from ..graph.simplify import Feeds
from .branch_layout import block_captured_maps
from .control_flow import TakenApart, take_apart
from .crossing import RowCrossing
from .policy_graph import PolicyGraphs, splice

_FLOAT, _BOOL, _INT64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64


@dataclass(frozen=True)
class SplitLevels:
    """The files, and what a host has to know to take rows out between them.

    Attributes:
        models: one for every exit, the network's end last.
        row_axes: name of a value that later files read -> the axis that counts its rows; a value that has no rows is
            not in it. Empty for files that take one row.
    """

    models: tuple[ir.Model, ...]
    row_axes: Mapping[str, int]


def split_levels(
    model: ir.Model, policy: PolicyGraphs, thresholds: Sequence[float], feeds: Sequence[Feeds]
) -> SplitLevels:
    """Cuts the flat graph of a network with K exits into K + 1 graphs.

    Args:
        model: flat, outputs ``logits.0`` ... ``logits.K``; not changed.
        policy: captured for as many rows as `model` takes.
        thresholds: K numbers, one for the initializer `thresholds` [1] of each file but the last.
        feeds: one row of inputs for a model that takes one; two example inputs with different numbers of rows for a
            dynamic batch, to find the row axis of every value.

    Raises:
        ExportError: a value that crosses a level has its rows folded into another axis; names it.
    """
    apart = take_apart(model)
    exits = len(apart.logits) - 1
    counts = {k: _value(f"level{k}/rows", _INT64, [1]) for k in range(1, exits + 1)}
    crossing = RowCrossing(apart, model, feeds, counts) if len(feeds) > 1 else None
    axis = {} if crossing is None else dict(crossing.axis)
    by_level = apart.by_level if crossing is None else crossing.by_level
    rows = _sizes(apart.inputs[0])[0]
    levels = [_Level(k, list(by_level[k]), rows) for k in range(exits + 1)]
    memory: list[ir.Value] = []
    for level in levels:
        if counts.get(level.k) is not None and counts[level.k].uses():
            level.count_rows(counts[level.k], axis)
        last = level.k == exits
        memory = level.decide(policy, apart.logits[level.k], memory, None if last else thresholds[level.k])
        if crossing is not None:
            axis.update(dict.fromkeys(level.handed_by_policy, 0))
    read_later: set[ir.Value] = set()
    graphs = []
    for level in reversed(levels):
        graphs.append(level.graph(apart, read_later))
        read_later |= level.reads
    names = {v.name or "" for v in read_later}
    row_axes = {v.name or "": place for v, place in axis.items() if v.name in names}
    _complete_shapes(graphs, model, feeds[0], row_axes, rows)
    return SplitLevels(tuple(apart.model_of(graph) for graph in reversed(graphs)), row_axes)


def _complete_shapes(
    graphs: Sequence[ir.Graph], model: ir.Model, feed: Feeds, row_axes: Mapping[str, int], rows: int | str
) -> None:
    """Gives what passes between the files the type and shape that a simplifier has dropped: rank, and what is fixed."""
    passing = [v for graph in graphs for v in [*graph.inputs, *graph.outputs] if v.shape is None or v.type is None]
    measured = measured_values(model, list(dict.fromkeys(v.name or "" for v in passing)), feed) if passing else {}
    fixed = all(isinstance(size, int) for value in model.graph.inputs for size in _sizes(value))
    for value in passing:
        array = measured[value.name or ""]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        sizes: list[int | str | None] = list(array.shape)
        axis = row_axes.get(value.name or "")
        value.shape = ir.Shape(sizes if fixed else [rows if i == axis else None for i in range(len(sizes))])


def _sizes(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [size if isinstance(size, int) else str(size) for size in value.shape]


class _Level:
    """One file in the making. Its nodes read values of other levels until `graph` cuts them off.

    Attributes:
        k: its number.
        nodes: in order.
        rows: how many it takes, or the name of that axis.
        reads: what it reads of the network's inputs and of earlier levels; known after `graph`.
        handed_by_policy: what its policy computes, row by row.
    """

    def __init__(self, k: int, nodes: list[ir.Node], rows: int | str) -> None:
        self.k, self.nodes, self.rows = k, nodes, rows
        self.network = list(nodes)
        self.reads: set[ir.Value] = set()
        self.handed_by_policy: list[ir.Value] = []
        self._stored: ir.Value | None = None
        self._outputs: list[ir.Value] = []

    def count_rows(self, count: ir.Value, axis: Mapping[ir.Value, int]) -> None:
        """Computes the number of rows, which sizes in the level are computed from, from a value that it reads."""
        read = next(v for node in self.network for v in node.inputs if v is not None and v in axis)
        span = {"start": axis[read], "end": axis[read] + 1}
        properties = {MODULE_KEY: ""}
        self.nodes.insert(
            0, ir.node("Shape", [read], span, outputs=[count], name=count.name, metadata_props=properties)
        )

    def decide(
        self, policy: PolicyGraphs, logits: ir.Value, memory: Sequence[ir.Value], threshold: float | None
    ) -> list[ir.Value]:
        """Appends the policy and the outputs; returns what it remembers. `threshold` is None for the network's end."""
        before = len(self.nodes)
        if threshold is None:
            (scores,) = splice(policy.finish, [logits, *memory], self.nodes, "exits.final")
            remembered: list[ir.Value] = []
        else:
            self._stored = _value(THRESHOLDS, _FLOAT, [1])
            self._stored.const_value = ir.tensor(np.asarray([threshold], np.float32), name=THRESHOLDS)
            source = policy.next if memory else policy.first
            inputs = [logits, self._stored, *memory]
            decided, scores, *remembered = splice(source, inputs, self.nodes, f"exits.{self.k}")
            self._outputs.append(_named(decided, DECIDED, _BOOL, self.nodes))
        for node in self.nodes[before:]:
            self.handed_by_policy += node.outputs
            for value in node.outputs:  # the policy's own name for the rows is another
                if value.shape is not None:
                    value.shape = ir.Shape([self.rows if isinstance(size, str) else size for size in _sizes(value)])
        label = ir.node("ArgMax", [scores], {"axis": 1, "keepdims": 0}, name="exits/ArgMax")
        label.metadata_props[MODULE_KEY] = ""
        label.outputs[0].name, label.outputs[0].type = LABEL, ir.TensorType(_INT64)
        label.outputs[0].shape = ir.Shape([self.rows])
        self.nodes.append(label)
        self._outputs += [label.outputs[0], _named(scores, SCORES, _FLOAT, self.nodes)]
        return remembered

    def graph(self, apart: TakenApart, read_later: set[ir.Value]) -> ir.Graph:
        """The graph with inputs and initializers of its own; hands on what of its values is `read_later`."""
        own = {value for node in self.nodes for value in node.outputs}
        outputs = [*self._outputs, *(v for v in own if v in read_later and v not in self._outputs)]
        outputs[len(self._outputs) :] = sorted(outputs[len(self._outputs) :], key=lambda v: v.name or "")
        graph = ir.Graph([], outputs, nodes=self.nodes, name=f"level{self.k}")
        if self.k > 0:
            block_captured_maps(graph, self.network)
        self._copy_constants(graph)
        inside = set(graph)
        outer = dict.fromkeys(v for node in graph for v in node.inputs if v is not None and v.producer() not in inside)
        for value in outer:
            if value is self._stored:
                continue
            fed = ir.Value(name=value.name, type=value.type, shape=value.shape)
            for node, index in [(n, i) for n, i in value.uses() if n in inside]:
                node.replace_input_with(index, fed)
            if value in apart.initializers:
                fed.const_value = value.const_value
                graph.initializers[fed.name or ""] = fed
            else:
                self.reads.add(value)
                graph.inputs.append(fed)
        if self._stored is not None:
            graph.initializers[THRESHOLDS] = self._stored
            graph.inputs.append(self._stored)
        return graph

    def _copy_constants(self, graph: ir.Graph) -> None:
        """A `Constant` of another level is this one's too: a file would hand on what never changes."""
        outer = {v for node in graph for v in node.inputs if v is not None} - {v for n in graph for v in n.outputs}
        for value in sorted(outer, key=lambda v: v.name or ""):
            maker = value.producer()
            if maker is None or maker.op_type != "Constant":
                continue
            copy = ir.node("Constant", [], dict(maker.attributes), name=maker.name, metadata_props=maker.metadata_props)
            copy.outputs[0].name, copy.outputs[0].type = value.name, value.type
            copy.outputs[0].shape = value.shape
            for node, index in [(n, i) for n, i in value.uses() if n.graph is graph]:
                node.replace_input_with(index, copy.outputs[0])
            graph.insert_before(graph[0], copy)


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _named(value: ir.Value, name: str, dtype: ir.DataType, nodes: list[ir.Node]) -> ir.Value:
    """`value` under the name of an output of the file; later levels may know it by its own."""
    copy = ir.node("Identity", [value], name=f"exits/{name}", metadata_props={MODULE_KEY: ""})
    copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    nodes.append(copy)
    return copy.outputs[0]
