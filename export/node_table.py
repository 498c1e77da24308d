"""What each node of the exported graph costs, for one row; the base of every MAC figure in a report (METHODS §0.1)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from edgewright.edge_runtime.manifest import ExitSpec, NodeRow
from edgewright.edge_runtime.session import session_on

from .capture import module_of
from .ledger import graphs
from .simplify import Feeds

Shapes = Mapping[str, tuple[int, ...]]

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _measured_shapes(model: ir.Model, names: Sequence[str], row: Feeds) -> Shapes:
    """Shapes of values when one row runs: also where axes are dynamic or folded into the batch."""
    proto = ir.to_proto(model)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    with tempfile.TemporaryDirectory(prefix="edgewright-shapes-") as folder:
        path = Path(folder, "model.onnx")
        onnx.save(proto, str(path))
        outputs = session_on(path, optimization_level="disabled").run(row)
    return {name: outputs[name].shape for name in names}


def flat_costs(model: ir.Model, row: Feeds) -> dict[str, tuple[int, int]]:
    """MACs and attention MACs (products of two activations) of every node of a flat graph, by node name.

    Args:
        model: the flat graph.
        row: one row of inputs; its lengths count where axes beside the batch are dynamic.
    """
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    shapes.update({name: array.shape for name, array in row.items()})
    needed = [
        value.name
        for node in model.graph
        if node.op_type in _PRODUCTS
        for value in (*node.inputs[:2], node.outputs[0])
        if value is not None and value.name and value.name not in shapes
    ]
    if needed:
        shapes.update(_measured_shapes(model, list(dict.fromkeys(needed)), row))
    constant: set[ir.Value] = set(model.graph.initializers.values())
    costs: dict[str, tuple[int, int]] = {}
    for node in model.graph:
        if all(v is None or v in constant for v in node.inputs):
            constant.update(node.outputs)
        macs = attention = 0
        if node.op_type in _PRODUCTS:
            left, right = node.inputs[0], node.inputs[1]
            output = node.outputs[0]
            assert left is not None and right is not None
            amount = _macs(node, *(shapes[v.name or ""] for v in (left, right, output)))
            if left in constant or right in constant:
                macs = 0 if left in constant and right in constant else amount
            else:
                attention = amount
        costs[node.name or ""] = (macs, attention)
    return costs


def _macs(node: ir.Node, left: Sequence[int], right: Sequence[int], output: Sequence[int]) -> int:
    if node.op_type == "Conv":
        return prod(output) * prod(right[1:])
    if node.op_type == "ConvTranspose":
        return prod(left) * prod(right[1:])
    transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int() == 1
    return prod(output) * (left[0] if transposed else left[-1])


def node_table(
    model: ir.Model, costs: Mapping[str, tuple[int, int]], exit_of: Mapping[str, int]
) -> tuple[NodeRow, ...]:
    """One row per node of the final graph, nested graphs included.

    Args:
        model: the final graph.
        costs: from `flat_costs`; nodes added since cost nothing.
        exit_of: exit of the nodes of the flat graph, by name; the others take their branch's.
    """
    rows: list[NodeRow] = []
    for path, graph in graphs(model.graph):
        depth = path.count(".else")
        for node in graph:
            macs, attention = costs.get(node.name or "", (0, 0))
            weights = {v.name: v.const_value.nbytes for v in node.inputs if v is not None and v.const_value is not None}
            rows.append(
                NodeRow(
                    name=node.name or "",
                    op=node.op_type,
                    outputs=tuple(v.name or "" for v in node.outputs),
                    module=module_of(node),
                    exit=exit_of.get(node.name or "", depth),
                    macs=macs,
                    attention_macs=attention,
                    weight_bytes=sum(weights.values()),
                )
            )
    return tuple(rows)


def exit_specs(rows: Sequence[NodeRow], names: Sequence[str]) -> tuple[ExitSpec, ...]:
    """Cumulative cost of leaving at each exit; `names` are the places of the heads, the last ``"final"``."""
    return tuple(
        ExitSpec(
            index=i,
            name=name,
            macs=sum(row.macs for row in rows if row.exit <= i),
            attention_macs=sum(row.attention_macs for row in rows if row.exit <= i),
        )
        for i, name in enumerate(names)
    )
