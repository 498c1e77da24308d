"""Sinks what only later exits need into the else-branches of nested `If`s (DESIGN §4 rules 1 to 3 and 6).

The flat graph computes the logits of every head. Every node belongs to the smallest exit whose logits need it. Level 0
stays in the main graph; the policy decides; level k goes into the else-branch of exit k-1::

    main:  level 0 -> head 0 -> policy -> If decided
           then: scores, exit_index of exit 0
           else: level 1 -> head 1 -> policy -> If decided
                 then: ...
                 else: level 2 -> ... -> the network's own end
           label = ArgMax scores

Values of outer levels are captured by name, as ONNX allows. Weights go where `weight_placement` puts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, LABEL, SCORES, THRESHOLDS

from ..graph.capture import MODULE_KEY, flat_name
from ..graph.nested_graphs import nodes_in, reads
from .branch_layout import block_captured_maps
from .policy_graph import PolicyGraphs, splice
from .weight_placement import Placement, place_initializers


def levels(graph: ir.Graph, heads: int) -> dict[ir.Node, int]:
    """Smallest head whose logits need the node, for every node that any head needs.

    A node in the body of a `Loop`, say, has the level of the node of `graph` that holds it.
    """
    outputs = {v.name: v for v in graph.outputs}
    level: dict[ir.Node, int] = {}
    for head in range(heads):
        pending = [outputs[flat_name(head)].producer()]
        while pending:
            node = pending.pop()
            if node is None or node in level:
                continue
            level[node] = head
            pending += [read.value.producer() for read in reads(node)]
    return with_nested(level)


def with_nested(level: Mapping[ir.Node, int]) -> dict[ir.Node, int]:
    """The same with the nodes of graphs inside nodes, which have the level of the node that holds them."""
    return {inner: k for node, k in level.items() for inner in (node, *nodes_in(node))}


@dataclass(frozen=True)
class TakenApart:
    """A flat graph whose nodes belong to no graph any more, so that they can move into branches.

    Attributes:
        level: of every node that a head needs, and of the nodes of graphs inside them.
        logits: of every head.
        by_level: the nodes of each level, in order.
        initializers: owned by no graph.
        inputs: of the graph.
    """

    model: ir.Model
    level: dict[ir.Node, int]
    logits: tuple[ir.Value, ...]
    by_level: tuple[list[ir.Node], ...]
    initializers: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]

    def model_of(self, main: ir.Graph) -> ir.Model:
        """A model with everything but the graph from the flat one."""
        main.name = "main"
        main.opset_imports.update(self.model.graph.opset_imports)
        sunk = ir.Model(main, ir_version=self.model.ir_version, producer_name=self.model.producer_name)
        sunk.metadata_props.update(self.model.metadata_props)
        return sunk


def take_apart(model: ir.Model) -> TakenApart:
    """Takes a copy of a flat graph with outputs ``logits.0`` ... ``logits.K`` apart."""
    model = model.clone()
    flat = model.graph
    heads = len(flat.outputs)
    level = levels(flat, heads)
    apart = TakenApart(
        model,
        level,
        tuple(next(v for v in flat.outputs if v.name == flat_name(i)) for i in range(heads)),
        tuple([node for node in flat if level.get(node) == k] for k in range(heads)),
        tuple(flat.initializers.values()),
        tuple(flat.inputs),
    )
    flat.outputs.clear()
    flat.inputs.clear()
    for node in list(flat):
        flat.remove(node)
    flat.initializers.clear()
    return apart


def sink(
    model: ir.Model,
    policy: PolicyGraphs,
    thresholds: Sequence[float],
    placement: Placement = "bytes",
) -> tuple[ir.Model, tuple[str, ...]]:
    """Turns the flat graph of a network with K exits into nested `If`s.

    Args:
        model: flat, for one row, outputs ``logits.0`` ... ``logits.K``; not changed.
        policy: the captured policy.
        thresholds: K numbers for the `thresholds` initializer.
        placement: see `place_initializers`.

    Returns:
        A model with outputs label int64 [1], scores float32 [1, C], exit_index int64 [1], and notes for the manifest.
    """
    apart = take_apart(model)
    _copy_captured_inputs(apart)
    builder = _Builder(policy, apart)
    main = builder.main(thresholds)
    notes = place_initializers(builder.level_graphs, apart.initializers, apart.level, placement)
    return apart.model_of(main), notes


def _copy_captured_inputs(apart: TakenApart) -> None:
    """Lets deeper levels read a copy of what they read of the graph's inputs.

    On a GPU an input that a branch captures is copied to the device in every branch anew. A concatenation of one tensor
    is the copy that ONNX Runtime does not optimize away.
    """
    for value in apart.inputs:
        deeper = [(node, index) for node, index in value.uses() if apart.level.get(node, 0) > 0]
        if not deeper:
            continue
        copy = ir.node("Concat", [value], {"axis": 0}, name=f"{value.name}/Concat", metadata_props={MODULE_KEY: ""})
        output = copy.outputs[0]
        output.name, output.type, output.shape = copy.name, value.type, value.shape
        for node, index in deeper:
            node.replace_input_with(index, output)
        apart.by_level[0].insert(0, copy)
        apart.level[copy] = 0


class _Builder:
    """Assembles the nested graphs from the deepest level outwards."""

    def __init__(self, policy: PolicyGraphs, apart: TakenApart) -> None:
        self.policy, self.apart = policy, apart
        self.logits, self.by_level = apart.logits, apart.by_level
        self.level_graphs: dict[int, ir.Graph] = {}
        self.exits = len(self.logits) - 1

    def main(self, thresholds: Sequence[float]) -> ir.Graph:
        stored, split = threshold_values(thresholds)
        self.thresholds = list(split.outputs)
        graph = self._level(0, None)
        complete_main(graph, self.apart.inputs, stored, split)
        return graph

    def _level(self, k: int, excluded: ir.Value | None) -> ir.Graph:
        """The graph of level k with everything nested below it; outputs scores [1, C] and exit_index [1]."""
        nodes = list(self.by_level[k])
        memory = [excluded] if excluded is not None else []
        if k == self.exits:
            (scores,) = splice(self.policy.finish, [self.logits[k], *memory], nodes, "exits.final")
            graph = ir.Graph([], _answer(k, scores, nodes), nodes=nodes, name="final")
        else:
            source = self.policy.next if memory else self.policy.first
            policy_nodes: list[ir.Node] = []
            inputs = [self.logits[k], self.thresholds[k], *memory]
            decided, scores, *memory = splice(source, inputs, policy_nodes, f"exits.{k}")
            needed = _ancestors([decided, *memory], policy_nodes)
            nodes += [n for n in policy_nodes if n in needed]
            leaving = [n for n in policy_nodes if n not in needed]
            then = ir.Graph([], _answer(k, scores, leaving), nodes=leaving, name=f"exit{k}_leave")
            deeper = self._level(k + 1, memory[0] if memory else None)
            prefix = "" if k == 0 else f"exit{k}/"
            branch = exit_branch(k, decided, then, deeper, [f"{prefix}{name}" for name in (SCORES, EXIT_INDEX)])
            nodes.append(branch)
            graph = ir.Graph([], list(branch.outputs), nodes=nodes, name="main" if k == 0 else f"level{k}")
        self.level_graphs[k] = graph
        if k > 0:
            block_captured_maps(graph, self.by_level[k])
        return graph


def exit_branch(k: int, condition: ir.Value, then: ir.Graph, deeper: ir.Graph, names: Sequence[str]) -> ir.Node:
    """The `If` of exit k.

    Args:
        k: the exit.
        condition: bool [1], whether `then` runs.
        then: the branch without the deeper levels.
        deeper: the branch with them; its outputs give types and shapes.
        names: of the outputs.
    """
    branch = ir.node(
        "If",
        [condition],
        {"then_branch": then, "else_branch": deeper},
        num_outputs=len(names),
        name=f"exit{k}/If",
        metadata_props={MODULE_KEY: ""},
    )
    for value, name, like in zip(branch.outputs, names, deeper.outputs, strict=True):
        value.name, value.type, value.shape = name, like.type, like.shape
    return branch


def threshold_values(thresholds: Sequence[float]) -> tuple[ir.Value, ir.Node]:
    """The initializer `thresholds` [K], and the node that splits it into K values [1].

    The caller makes the initializer a graph input as well: that is how ONNX says that a caller may set it, and
    what keeps a runtime from folding the stored values into what reads them. Without it ONNX Runtime folds them at
    every level but `disabled`, even where `SessionOptions.add_initializer` overrides them, without a word.
    """
    values = np.asarray(thresholds, dtype=np.float32)
    stored = ir.Value(
        name=THRESHOLDS,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([len(values)]),
        const_value=ir.tensor(values, name=THRESHOLDS),
    )
    split = ir.node(
        "Split",
        [stored],
        {"axis": 0, "num_outputs": len(values)},
        num_outputs=len(values),
        name="exits/Split",
        metadata_props={MODULE_KEY: ""},
    )
    for k, value in enumerate(split.outputs):
        value.name, value.type, value.shape = f"exits.{k}/threshold", stored.type, ir.Shape([1])
    return stored, split


def complete_main(graph: ir.Graph, inputs: Sequence[ir.Value], stored: ir.Value, split: ir.Node) -> None:
    """Gives the outermost graph, which has outputs scores and exit_index so far, its inputs, thresholds and label.

    Args:
        graph: changed.
        inputs: of the network.
        stored: from `threshold_values`, as `split` is.
        split: its node.
    """
    graph.insert_before(graph[0], split)
    scores, exit_index = graph.outputs
    # one node behind all branches
    label = ir.node(
        "ArgMax", [scores], {"axis": 1, "keepdims": 0}, name="exits/ArgMax", metadata_props={MODULE_KEY: ""}
    )
    assert scores.shape is not None
    label.outputs[0].name, label.outputs[0].type = LABEL, ir.TensorType(ir.DataType.INT64)
    label.outputs[0].shape = ir.Shape([scores.shape[0]])
    graph.append(label)
    graph.outputs.clear()
    graph.outputs.extend([label.outputs[0], scores, exit_index])
    graph.initializers[THRESHOLDS] = stored
    graph.inputs.extend([*inputs, stored])


def _answer(k: int, scores: ir.Value, nodes: list[ir.Node]) -> list[ir.Value]:
    """The two outputs of a branch; every branch's have the same types and shapes."""
    own = {v for node in nodes for v in node.outputs}
    if scores not in own:
        # a branch must own its outputs: the scores were computed outside, to decide
        identity = ir.node("Identity", [scores], name=f"exits.{k}/Identity")
        identity.outputs[0].name, identity.outputs[0].type = f"exits.{k}/Identity", scores.type
        identity.outputs[0].shape = scores.shape
        nodes.append(identity)
        scores = identity.outputs[0]
    value = ir.tensor(np.asarray([k], dtype=np.int64))
    constant = ir.node("Constant", [], {"value": value}, name=f"exits.{k}/exit_index")
    constant.outputs[0].name = f"exits.{k}/exit_index"
    constant.outputs[0].type, constant.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    nodes.append(constant)
    return [scores, constant.outputs[0]]


def _ancestors(values: Sequence[ir.Value], among: Sequence[ir.Node]) -> set[ir.Node]:
    inside = set(among)
    found: set[ir.Node] = set()
    pending = [v.producer() for v in values]
    while pending:
        node = pending.pop()
        if node is None or node in found or node not in inside:
            continue
        found.add(node)
        pending += [v.producer() for v in node.inputs if v is not None]
    return found
