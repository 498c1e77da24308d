"""Sinks what only later exits need into the else-branches of nested `If`s (DESIGN §4 rules 1 to 3 and 6).

The flat graph computes the logits of every head. Every node belongs to the smallest exit whose logits need it. Level 0
stays in the main graph; the policy decides; level k goes into the else-branch of exit k-1::

    main:  level 0 -> head 0 -> policy -> If decided
           then: label, scores, exit_index of exit 0
           else: level 1 -> head 1 -> policy -> If decided
                 then: ...
                 else: level 2 -> ... -> the network's own end

Values of outer levels are captured by name, as ONNX allows. Weights go where `weight_placement` puts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgewright.edge_runtime.errors import ExportError
from edgewright.edge_runtime.manifest import EXIT_INDEX, LABEL, SCORES, THRESHOLDS

from .capture import MODULE_KEY, logits_name
from .policy_graph import PolicyGraphs
from .weight_placement import Placement, place_initializers


def levels(graph: ir.Graph, heads: int) -> dict[ir.Node, int]:
    """Smallest head whose logits need the node, for every node that any head needs."""
    outputs = {v.name: v for v in graph.outputs}
    level: dict[ir.Node, int] = {}
    for head in range(heads):
        pending = [outputs[logits_name(head)].producer()]
        while pending:
            node = pending.pop()
            if node is None or node in level:
                continue
            level[node] = head
            pending += [v.producer() for v in node.inputs if v is not None]
    return level


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
    model = model.clone()
    flat = model.graph
    heads = len(flat.outputs)
    level = levels(flat, heads)
    logits = [next(v for v in flat.outputs if v.name == logits_name(i)) for i in range(heads)]
    by_level = [[node for node in flat if level.get(node) == k] for k in range(heads)]
    initializers = list(flat.initializers.values())
    inputs = list(flat.inputs)
    opset = flat.opset_imports[""]
    flat.outputs.clear()
    flat.inputs.clear()
    for node in list(flat):
        flat.remove(node)
    flat.initializers.clear()

    builder = _Builder(policy, logits, by_level, opset)
    main = builder.main(inputs, thresholds)
    notes = place_initializers(main, builder.level_graphs, initializers, level, placement)
    sunk = ir.Model(main, ir_version=model.ir_version, producer_name=model.producer_name)
    sunk.metadata_props.update(model.metadata_props)
    return sunk, notes


class _Builder:
    """Assembles the nested graphs from the deepest level outwards."""

    def __init__(
        self,
        policy: PolicyGraphs,
        logits: Sequence[ir.Value],
        by_level: Sequence[Sequence[ir.Node]],
        opset: int,
    ) -> None:
        self.policy, self.logits, self.by_level = policy, logits, by_level
        self.opset = opset
        self.level_graphs: dict[int, ir.Graph] = {}
        self.exits = len(logits) - 1

    def main(self, inputs: Sequence[ir.Value], thresholds: Sequence[float]) -> ir.Graph:
        values = np.asarray(thresholds, dtype=np.float32)
        self.thresholds = ir.Value(
            name=THRESHOLDS,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([len(values)]),
            const_value=ir.tensor(values, name=THRESHOLDS),
        )
        graph = self._level(0, None)
        graph.initializers[THRESHOLDS] = self.thresholds
        graph.inputs.extend(inputs)
        graph.name = "main"
        graph.opset_imports[""] = self.opset
        return graph

    def _level(self, k: int, excluded: ir.Value | None) -> ir.Graph:
        """The graph of level k with everything nested below it."""
        if k == self.exits:
            nodes = list(self.by_level[k])
            inputs = [self.logits[k], *([excluded] if excluded is not None else [])]
            scores, label = self._splice(self.policy.finish, inputs, nodes, "exits.final")
            graph = ir.Graph([], self._answer(k, label, scores, nodes), nodes=nodes, name="final")
        else:
            nodes = list(self.by_level[k])
            source = self.policy.first if excluded is None else self.policy.next
            inputs = [self.logits[k], self.thresholds, *([excluded] if excluded is not None else [])]
            policy_nodes: list[ir.Node] = []
            decided, scores, label, *memory = self._splice(source, inputs, policy_nodes, f"exits.{k}", k)
            needed = _ancestors([decided, *memory], policy_nodes)
            nodes += [n for n in policy_nodes if n in needed]
            leaving = [n for n in policy_nodes if n not in needed]
            then = ir.Graph([], self._answer(k, label, scores, leaving), nodes=leaving, name=f"exit{k}_leave")
            deeper = self._level(k + 1, memory[0] if memory else None)
            branch = ir.node(
                "If",
                [decided],
                {"then_branch": then, "else_branch": deeper},
                num_outputs=3,
                name=f"exit{k}/If",
                metadata_props={MODULE_KEY: ""},
            )
            nodes.append(branch)
            for value, name, like in zip(branch.outputs, (LABEL, SCORES, EXIT_INDEX), deeper.outputs, strict=True):
                value.name = name if k == 0 else f"exit{k}/{name}"
                value.type, value.shape = like.type, like.shape
            graph = ir.Graph([], list(branch.outputs), nodes=nodes, name="main" if k == 0 else f"level{k}")
        self.level_graphs[k] = graph
        return graph

    def _answer(self, k: int, label: ir.Value, scores: ir.Value, nodes: list[ir.Node]) -> list[ir.Value]:
        """The three outputs of a branch; every branch's have the same types and shapes."""
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
        return [label, scores, constant.outputs[0]]

    def _splice(
        self, source: ir.Model, inputs: Sequence[ir.Value], nodes: list[ir.Node], prefix: str, k: int | None = None
    ) -> list[ir.Value]:
        """Copies the nodes of a policy graph behind `nodes`, reading `inputs`; returns its outputs.

        With `k`, the second input is `thresholds` of which the graph is to see element k.
        """
        copy = source.clone().graph
        if k is not None:
            _pick_threshold(copy, k)
        values = dict(zip(copy.inputs, inputs, strict=True))
        outputs = list(copy.outputs)
        copy.outputs.clear()
        counts: dict[str, int] = {}
        for name, value in list(copy.initializers.items()):
            constant = ir.node("Constant", [], {"value": value.const_value}, name=f"{prefix}/{name}")
            constant.outputs[0].name = f"{prefix}/{name}"
            constant.outputs[0].type, constant.outputs[0].shape = value.type, value.shape
            constant.metadata_props[MODULE_KEY] = ""
            values[value] = constant.outputs[0]
            nodes.append(constant)
        for node in list(copy):
            copy.remove(node)
            for i, read in enumerate(node.inputs):
                if read is not None and read in values:
                    node.replace_input_with(i, values[read])
            stem = f"{prefix}/{node.op_type}"
            counts[stem] = counts.get(stem, 0) + 1
            node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"
            node.metadata_props.clear()
            node.metadata_props[MODULE_KEY] = ""
            for i, value in enumerate(node.outputs):
                value.name = node.name if i == 0 else f"{node.name}.{i}"
                value.metadata_props.clear()
            nodes.append(node)
        return outputs


def _pick_threshold(graph: ir.Graph, k: int) -> None:
    """Lets a policy graph take the whole `thresholds` [K] and use element k, behind the first operation on it.

    A Gather on the initializer itself would be folded when the session is made, and ONNX Runtime folds the stored
    values even where `SessionOptions.add_initializer` overrides them: the override would be lost without a word.
    """
    uses = list(graph.inputs[1].uses())
    node = uses[0][0]
    if len(uses) != 1 or len(node.inputs) != 2 or node.op_type not in ("Add", "Div", "Greater", "Less", "Mul", "Sub"):
        raise ExportError(
            "an exit policy must use its threshold in exactly one sum, product or comparison with a value of the row: "
            f"it is read by {[n.op_type for n, _ in uses]}"
        )
    every = node.outputs[0]
    index = ir.node("Constant", [], {"value": ir.tensor(np.asarray([k], dtype=np.int64))}, name="index")
    index.outputs[0].name = "index"
    index.outputs[0].type, index.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    pick = ir.node("Gather", [every, index.outputs[0]], {"axis": -1}, name="pick")
    picked = pick.outputs[0]
    picked.name, picked.type, picked.shape = "picked", every.type, every.shape
    every.shape = None
    for user, where in list(every.uses()):
        if user is not pick:
            user.replace_input_with(where, picked)
    for i, value in enumerate(graph.outputs):
        if value is every:
            graph.outputs[i] = picked
    graph.insert_after(node, [index, pick])


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
