"""Writing a graph to a file, its weights beside it where one protobuf cannot hold them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from edgewright.edge_runtime.bundle.manifest import THRESHOLDS
from edgewright.edge_runtime.errors import ExportError

EXTERNAL_ABOVE = 1_800_000_000
"""Bytes of weights above which they go to a file of their own: a protobuf ends at 2 GiB, and holds the graph too."""

BRANCHES_ABOVE = 1 << 27
"""The same for a graph with branches. Weights inside the protobuf of a branch stay in memory beside those that ONNX
Runtime makes of them, again for each branch around it: from a file of their own, 290 MB behind two exits took half of a
session's memory and a quarter of its start."""

_INLINE_BYTES = 1024
"""Tensors below this size stay in the graph's file: shapes, scales, and the thresholds, which a device sets there."""


def data_file(path: Path) -> Path:
    """Where the weights of the model file `path` lie if they are external."""
    return path.with_name(f"{path.name}.data")


def save_model(model: ir.Model, path: Path, external_above: int | None = None) -> None:
    """Writes `model` to `path`, and its weights to `data_file` if they are more than `external_above` bytes.

    Args:
        model: not changed.
        path: the file.
        external_above: bytes of all initializers; None: `BRANCHES_ABOVE` for a graph with branches, else
            `EXTERNAL_ABOVE`.

    Raises:
        ValueError: `thresholds` is too long to stay in the graph's file.
    """
    if external_above is None:
        branches = any(node.op_type == "If" for node in model.graph)
        external_above = BRANCHES_ABOVE if branches else EXTERNAL_ABOVE
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= external_above:
        ir.save(model, path)
        return
    thresholds = model.graph.initializers.get(THRESHOLDS)
    if thresholds is not None and thresholds.const_value is not None and thresholds.const_value.nbytes >= _INLINE_BYTES:
        raise ValueError(f"{THRESHOLDS!r} has {thresholds.const_value.nbytes} bytes: a device could not set it")
    save_external(model, path)


def save_external(model: ir.Model, path: Path) -> None:
    """Writes `model` with its weights in `data_file`, however few: the quickest way."""
    ir.save(model, path, external_data=data_file(path).name, size_threshold_bytes=_INLINE_BYTES)


def check_file(path: Path) -> None:
    """Holds a written file to the ONNX standard.

    Raises:
        ExportError: it is no valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX, please report it: {str(error)[:500]}") from error
