"""Keeps ONNX Runtime's blocked convolution layout in the branches of an `If`.

ONNX Runtime runs convolutions on maps in blocks of 8 or 16 channels and fuses a residual addition into the convolution
in front of it, but only while both addends are blocked. A value that a branch captures comes in the plain layout: the
convolution that reads it reorders it for itself, the addition around that convolution stays alone, its result is
plain, and so every later addition of the same stream stays alone too, with two reorders each.

A convolution of 1x1 with one weight per channel, all 1, is the identity (of a NaN as well), and ONNX Runtime blocks it
by itself, whatever the width as long as it is a multiple of 4. Behind one of these at the branch's start the whole
stream is blocked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..graph.capture import MODULE_KEY

_MULTIPLE = 4
"""ONNX Runtime reorders maps into blocks only if their channels are a multiple of this; it fills the last block up."""


def block_captured_maps(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Puts an identity at the start of a branch for every captured map that a convolution and an addition there read.

    Args:
        graph: the branch; changed.
        nodes: its nodes that come from the network, in order.
    """
    own = {value for node in nodes for value in node.outputs}
    captured = dict.fromkeys(node.inputs[0] for node in nodes if node.op_type == "Conv" and node.inputs[0] is not None)
    for value in captured:
        inside = [(node, index) for node, index in value.uses() if node in nodes]
        channels = _channels(value)
        if value in own or value.is_graph_input() or channels is None or channels % _MULTIPLE:
            continue
        if not any(node.op_type == "Add" for node, _ in inside):
            continue
        name = f"{value.name}@{graph.name}"
        ones = ir.tensor(np.ones((channels, 1, 1, 1), np.float32))
        # a constant: it is no weight of the model's
        constant = ir.node("Constant", [], {"value": ones}, name=f"{name}/ones", metadata_props={MODULE_KEY: ""})
        weight = constant.outputs[0]
        weight.name, weight.type, weight.shape = constant.name, value.type, ir.Shape([channels, 1, 1, 1])
        identity = ir.node(
            "Conv",
            [value, weight],
            {"kernel_shape": [1, 1], "group": channels},
            name=name,
            metadata_props={MODULE_KEY: ""},
        )
        blocked = identity.outputs[0]
        blocked.name, blocked.type, blocked.shape = name, value.type, value.shape
        for node, index in inside:
            node.replace_input_with(index, blocked)
        graph.insert_before(nodes[0], [constant, identity])


def _channels(value: ir.Value) -> int | None:
    shape = value.shape
    channels = shape[1] if shape is not None and len(shape) == 4 else None
    return channels if isinstance(channels, int) and value.dtype == ir.DataType.FLOAT else None
