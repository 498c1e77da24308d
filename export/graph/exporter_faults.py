"""What PyTorch's exporter gets wrong, put right in the graph that it gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_BIAS = 2
_SAME_VALUE = ("Cast", "CastLike", "Identity", "Expand", "Reshape", "Unsqueeze", "Squeeze")


_SMALL = 16
"""Most elements of what is folded to decide a branch: conditions, axes and sizes, no weights."""


def mend(model: ir.Model) -> None:
    """Mends a fresh capture, in place; graphs inside nodes too."""
    for node in list(model.graph.all_nodes()):
        if node.op_type in _CONVOLUTIONS and node.domain == "":
            _drop_bias_of_zeros(node)
    if any(node.op_type == "If" for node in model.graph.all_nodes()):
        # branches that the exporter has decided (an EmbeddingBag has four, nested) end ONNX Runtime 1.31 with a
        # segmentation fault when it decides them itself
        onnxscript.optimizer.fold_constants(model, input_size_limit=_SMALL, output_size_limit=_SMALL)
        onnxscript.optimizer.remove_unused_nodes(model)


def _drop_bias_of_zeros(node: ir.Node) -> None:
    """A convolution without bias has none.

    The exporter makes a tensor of zeros for it, with a shape that no runtime takes in 3-D: [channels, 2].
    """
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    if bias is None or not _computed_zero(bias):
        return
    node.resize_inputs(_BIAS)
    _remove_unread(bias)


def _computed_zero(value: ir.Value) -> bool:
    """Whether a value is made of a constant zero; an initializer is the model's own, whatever is in it."""
    node = value.producer()
    while node is not None and node.op_type in _SAME_VALUE:
        value = node.inputs[0] or value
        node = value.producer()
    if node is None or node.op_type != "Constant":
        return False
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and not np.any(tensor.numpy())


def _remove_unread(value: ir.Value) -> None:
    """Removes what made a value that nothing reads any more."""
    node = value.producer()
    if node is None or node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    inputs = [v for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for read in inputs:
        _remove_unread(read)
