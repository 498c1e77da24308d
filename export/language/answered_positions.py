"""The head of a language model computed only where somebody reads it: after a prompt, at its last token alone.

At 256 tokens the head of a small model is a quarter of the work of reading a prompt, and its logits are the largest
tensor of all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgewright.edge_runtime.bundle.manifest import LOGITS, LOGITS_FROM

from ..graph.capture import MODULE_KEY

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"})
_AXIS = 1
"""Of the tokens, in [N, tokens, width]."""


def choose_positions(graph: ir.Graph) -> bool:
    """Lets the caller say from which new token on `LOGITS` are wanted: the input `LOGITS_FROM`, which has a default.

    The cut lies before the first of the products with constant weights at the end of the graph, if nothing else reads
    what follows.

    Args:
        graph: of a generator, without branches; changed.

    Returns:
        False where the graph ends in something else; it is left as it is then.
    """
    (logits,) = (value for value in graph.outputs if value.name == LOGITS)
    value, head, behind = logits, None, [logits]
    while (node := value.producer()) is not None and node.op_type in _ELEMENTWISE | {"MatMul"}:
        live = [x for x in node.inputs if x is not None and not _is_constant(x)]
        if len(live) != 1 or (node.op_type == "MatMul" and live[0] is not node.inputs[0]):
            break
        (value,) = live
        if node.op_type == "MatMul":
            head = node
            cut = list(behind)
        if len(value.uses()) != 1 or value.is_graph_output():
            break
        behind.append(value)
    if head is None:
        return False
    read = head.inputs[0]
    if read is None or read.shape is None or len(read.shape) != 3:
        return False
    start = _initializer(LOGITS_FROM, [0])
    ends, axes = (
        _initializer(f"{LOGITS_FROM}.end", [np.iinfo(np.int64).max]),
        _initializer(f"{LOGITS_FROM}.axis", [_AXIS]),
    )
    kept = ir.node(
        "Slice",
        [read, start, ends, axes],
        name=f"{LOGITS_FROM}/Slice",
        metadata_props={MODULE_KEY: head.metadata_props.get(MODULE_KEY, "")},
    )
    kept.outputs[0].name, kept.outputs[0].type = f"{LOGITS_FROM}/kept", read.type
    kept.outputs[0].shape = _with_own_length(read.shape)
    graph.insert_before(head, kept)
    head.replace_input_with(0, kept.outputs[0])
    for changed in cut:
        if changed.shape is not None:
            changed.shape = _with_own_length(changed.shape)
    for made in (start, ends, axes):
        graph.initializers[made.name] = made  # type: ignore[index]
    # an initializer that is an input too: a default that a caller may replace, and that no runtime folds
    graph.inputs.append(start)
    return True


def _is_constant(value: ir.Value) -> bool:
    """An initializer, or what a transposition or conversion makes of one."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    if node.op_type == "Constant":
        return True
    return node.op_type in {"Transpose", "Cast", "Identity"} and all(x is None or _is_constant(x) for x in node.inputs)


def _initializer(name: str, values: list[int]) -> ir.Value:
    stored = np.asarray(values, np.int64)
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([len(values)]),
        const_value=ir.tensor(stored, name=name),
    )


def _with_own_length(shape: ir.Shape) -> ir.Shape:
    dims = list(shape)
    dims[_AXIS] = ir.SymbolicDim("answered")
    return ir.Shape(dims)
