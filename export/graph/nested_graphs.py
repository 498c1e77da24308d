"""Graphs inside a node, and what they read of the graph around it.

The body of a `Loop` or `Scan` and the branches of an `If` name values of the outer graph without listing them among the
node's inputs. Whoever asks what a node reads asks `reads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Read:
    """One place where a value is read: input `at` of `node`, which may lie in a graph inside another node."""

    node: ir.Node
    at: int
    value: ir.Value


def graphs_in(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that are attributes of the node; those inside them are not among them."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nodes_in(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of all graphs inside the node, at any depth; not the node itself."""
    for graph in graphs_in(node):
        yield from graph.all_nodes()


def reads(node: ir.Node) -> list[Read]:
    """What the node reads of the graph around it: its inputs, then what graphs inside it capture, in order."""
    found = [Read(node, index, value) for index, value in enumerate(node.inputs) if value is not None]
    inside = list(nodes_in(node))
    if inside:
        own = {value for inner in inside for value in inner.outputs}
        for graph in _all_graphs(node):
            own.update(graph.inputs, graph.initializers.values())
        found += [
            Read(inner, index, value)
            for inner in inside
            for index, value in enumerate(inner.inputs)
            if value is not None and value not in own
        ]
    return found


def _all_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for graph in graphs_in(node):
        yield graph
        yield from graph.subgraphs()
