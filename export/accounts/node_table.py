"""What each node of the exported graph costs, for one row; the base of every MAC figure in a report (METHODS §0.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import ExitSpec, NodeRow, OperatingPoint
from edgewright.edge_runtime.inference.session import session_on
from edgewright.edge_runtime.process.scratch import Scratch

from ..graph.capture import module_of
from ..graph.model_file import save_external
from ..graph.simplify import Feeds
from .ledger import graphs
from .operator_costs import Factor, Macs, factors_of, macs_of, may_multiply_unknown

Shapes = Mapping[str, tuple[int, ...]]

_OF_SHAPES = ("Shape", "Size")
"""Their result is the same for every row."""


def measured_shapes(model: ir.Model, names: Sequence[str], row: Feeds) -> Shapes:
    """Shapes of values when one row runs: also where axes are dynamic or folded into the batch."""
    return {name: value.shape for name, value in measured_values(model, names, row).items()}


def measured_values(model: ir.Model, names: Sequence[str], row: Feeds) -> Mapping[str, NDArray[Any]]:
    """What a flat graph computes for `row`, by the names of its values."""
    with Scratch("edgewright-shapes-") as folder:
        path = folder / "model.onnx"
        save_external(model, path)  # so that the graph can be read and written again without weights
        proto = onnx.load(str(path), load_external_data=False)
        known = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        onnx.save(proto, str(path))
        outputs = session_on(path, optimization_level="disabled").run(row)
    return {name: outputs[name] for name in names}


def flat_costs(model: ir.Model, row: Feeds) -> dict[str, Macs]:
    """What every node of a flat graph costs, by node name.

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
    products = {node: factors for node in model.graph if (factors := factors_of(node)) is not None}
    outputs = {node: next(v for v in node.outputs if v.name) for node in products}
    needed = dict.fromkeys(
        value.name
        for node, factors in products.items()
        for value in (*factors, outputs[node])
        if value is not None and value.name and value.name not in shapes
    )
    if needed:
        shapes.update(measured_shapes(model, list(needed), row))
    constant = _constants(model)
    costs: dict[str, Macs] = {}
    for node, factors in products.items():
        given = [None if v is None else Factor(shapes[v.name or ""], v in constant) for v in factors]
        costs[node.name or ""] = macs_of(node, given, shapes[outputs[node].name or ""])
    return costs


def _constants(model: ir.Model) -> set[ir.Value]:
    """Values that no input reaches."""
    constant: set[ir.Value] = set(model.graph.initializers.values())
    for node in model.graph:
        if node.op_type in _OF_SHAPES or all(v is None or v in constant for v in node.inputs):
            constant.update(node.outputs)
    return constant


def uncounted(model: ir.Model) -> tuple[str, ...]:
    """A note if nodes of the flat graph may hold products that no formula is known for: a 0 would be a claim."""
    nodes = [node for node in model.graph if may_multiply_unknown(node)]
    if not nodes:
        return ()
    named = ", ".join(f"{node.name} ({node.domain or 'ai.onnx'}:{node.op_type})" for node in nodes[:5])
    more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
    return (f"MACs are a lower bound: {named}{more} may hold products that the node table cannot count",)


def node_table(model: ir.Model, costs: Mapping[str, Macs], exit_of: Mapping[str, int]) -> tuple[NodeRow, ...]:
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
            cost = costs.get(node.name or "", Macs())
            weights = {v.name: v.const_value.nbytes for v in node.inputs if v is not None and v.const_value is not None}
            rows.append(
                NodeRow(
                    name=node.name or "",
                    op=node.op_type,
                    outputs=tuple(v.name or "" for v in node.outputs),
                    module=module_of(node),
                    exit=exit_of.get(node.name or "", depth),
                    macs=cost.weight,
                    attention_macs=cost.attention,
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


def on_the_graph(
    points: Sequence[OperatingPoint], exits: Sequence[ExitSpec]
) -> tuple[tuple[OperatingPoint, ...], tuple[str, ...]]:
    """Operating points with the mean MACs of the exported graph, and a note for each that the search costed otherwise.

    The search counts what runs before an exit in PyTorch's order; the graph runs for an exit what its logits need.
    The two differ where exits lie in parallel branches.

    Args:
        points: with the metrics ``exit_share_<i>`` if they come from a search; the others stay as they are.
        exits: from `exit_specs`.
    """
    found, notes = [], []
    for point in points:
        shares = [point.metrics.get(f"exit_share_{i}") for i in range(len(exits))]
        given = point.metrics.get("mean_macs")
        if given is None or any(share is None for share in shares):
            found.append(point)
            continue
        mean = sum((share or 0.0) * way.macs for share, way in zip(shares, exits, strict=True))
        metrics = {**point.metrics, "mean_macs": mean, "mac_share": mean / max(1, exits[-1].macs)}
        if abs(mean - given) > 1e-6 * max(mean, given):
            # found under the search's costs, and its shares are not known
            for other in ("greedy_mean_macs", "geometric_mean_macs"):
                metrics.pop(other, None)
            notes.append(
                f"operating point {point.name}: the mean row costs {mean:.0f} MACs in the exported graph, the search "
                f"counted {given:.0f}: exits in parallel branches do not need all that PyTorch runs before them"
            )
        found.append(dataclasses.replace(point, metrics=metrics))
    return tuple(found), tuple(notes)
