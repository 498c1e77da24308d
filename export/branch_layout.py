"""Keeps ONNX Runtime's blocked convolution layout in the branches of an `If`.

ONNX Runtime runs convolutions on maps in blocks of 8 or 16 channels and fuses a residual addition into the convolution
in front of it, but only while both addends are blocked. A value that a branch captures comes in the plain layout: the
convolution that reads it reorders it for itself, the addition around that convolution stays alone, its result is
plain, and so every later addition of the same stream stays alone too, with two reorders each.

An average pool of 1x1 is the identity (of a NaN as well, which a maximum would drop), and one of the few operations
that ONNX Runtime blocks by itself. Behind one pool at the branch's start the whole stream is blocked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .capture import MODULE_KEY

_BLOCK = 16
"""ONNX Runtime blocks a pool only if its channels fill the blocks; 16 is the widest (AVX-512)."""


def block_captured_maps(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Puts a 1x1 pool at the start of a branch for every captured map that a convolution and an addition there read.

    Args:
        graph: the branch; changed.
        nodes: its nodes that come from the network, in order.
    """
    own = {value for node in nodes for value in node.outputs}
    captured = dict.fromkeys(node.inputs[0] for node in nodes if node.op_type == "Conv" and node.inputs[0] is not None)
    for value in captured:
        inside = [(node, index) for node, index in value.uses() if node in nodes]
        if value in own or value.is_graph_input() or not _fills_blocks(value):
            continue
        if not any(node.op_type == "Add" for node, _ in inside):
            continue
        pool = ir.node(
            "AveragePool",
            [value],
            {"kernel_shape": [1, 1]},
            name=f"{value.name}@{graph.name}",
            metadata_props={MODULE_KEY: ""},
        )
        blocked = pool.outputs[0]
        blocked.name, blocked.type, blocked.shape = pool.name, value.type, value.shape
        for node, index in inside:
            node.replace_input_with(index, blocked)
        graph.insert_before(nodes[0], pool)


def _fills_blocks(value: ir.Value) -> bool:
    shape = value.shape
    channels = shape[1] if shape is not None and len(shape) == 4 else None
    return isinstance(channels, int) and channels % _BLOCK == 0
