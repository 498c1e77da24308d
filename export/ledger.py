"""Where the weight bytes are at each step of the export; proves that what is shared stays shared (DESIGN §4 rule 4)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from edgewright.edge_runtime.manifest import Ledger, LedgerRow
from edgewright.models.layers.factorized import SharedBasis


def torch_unique_bytes(model: nn.Module) -> int:
    """Bytes of unique parameter and buffer storage; integer counters such as batch norm's are left out."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            seen[(tensor.data_ptr(), tensor.numel())] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def graphs(graph: ir.Graph, path: str = "") -> Iterator[tuple[str, ir.Graph]]:
    """The graph and everything nested in it, with a path: ``""``, ``"exit0.else"``, ``"exit0.else/exit1.then"``."""
    yield path, graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                branch = attribute.name.removesuffix("_branch")
                step = f"{(node.name or node.op_type).removesuffix('/If')}.{branch}"
                yield from graphs(attribute.as_graph(), f"{path}/{step}" if path else step)


_NO_WEIGHTS = (ir.DataType.INT64, ir.DataType.BOOL)
"""Types of shapes, axes and masks, which a simplifier may add when it folds a computation."""


def _initializers(model: ir.Model) -> Iterator[tuple[str, ir.Value, ir.TensorProtocol]]:
    for path, graph in graphs(model.graph):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype not in _NO_WEIGHTS:
                yield path, value, value.const_value


def _digest(tensor: ir.TensorProtocol) -> str:
    head = f"{tensor.dtype.name}{list(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.tobytes()).hexdigest()


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all weight initializers in all nested graphs, copies counted; shapes and masks are no weights."""
    return sum(tensor.nbytes for _, _, tensor in _initializers(model))


def unique_bytes(model: ir.Model) -> int:
    """Bytes of distinct weight initializer contents."""
    return sum({_digest(tensor): tensor.nbytes for _, _, tensor in _initializers(model)}.values())


def ledger_rows(model: ir.Model) -> tuple[LedgerRow, ...]:
    """One row per weight initializer, in the order of the file."""
    return tuple(
        LedgerRow(
            name=value.name or "",
            dtype=tensor.dtype.name.lower(),
            shape=tuple(int(d) for d in tensor.shape.numpy()),
            bytes=tensor.nbytes,
            sha256=_digest(tensor),
            graph=path,
            readers=tuple(node.name or node.op_type for node, _ in value.uses()),
        )
        for path, value, tensor in _initializers(model)
    )


def shared_bases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Bases that several modules use: initializer name -> module paths, in order."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SharedBasis):
            users.setdefault(id(module), []).append(path)
    return {
        f"{paths[0]}.weight": tuple(p.rpartition(".")[0] for p in paths) for paths in users.values() if len(paths) > 1
    }


def sharing_in_file(model: ir.Model, shared: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The entries of `shared` whose basis is one initializer of the file and serves at least two factorized modules."""
    rows = {row.name: row for row in ledger_rows(model)}
    digests: dict[str, int] = {}
    for row in rows.values():
        digests[row.sha256] = digests.get(row.sha256, 0) + 1
    found = {}
    nodes = list(model.graph.all_nodes())
    for name, modules in shared.items():
        basis = rows.get(name)
        users = tuple(m for m in modules if _serves(nodes, name, f"{m}.coefficients"))
        if basis is not None and basis.readers and digests[basis.sha256] == 1 and len(users) > 1:
            found[name] = users
    return found


def _serves(nodes: Sequence[ir.Node], basis: str, coefficients: str) -> bool:
    """Whether a node multiplies `coefficients` with what a reader of `basis` has made."""
    for node in nodes:
        if coefficients in (v.name for v in node.inputs if v is not None):
            makers = [v.producer() for v in node.inputs if v is not None]
            return any(m is not None and basis in (v.name for v in m.inputs if v is not None) for m in makers)
    return False


def runtime_bytes(model_path: Path) -> int | None:
    """Bytes of all initializers after ONNX Runtime's basic optimizations on the CPU.

    Basic, because the extended level fuses and the full level reorders convolution weights for this processor: both
    say nothing about duplication on another.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="edgewright-ledger-") as folder:
        target = Path(folder, "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        return stored_bytes(ir.load(target))


def build_ledger(torch_model: nn.Module, raw_unique: int, exported: ir.Model, model_path: Path) -> Ledger:
    """The whole ledger for a manifest.

    Args:
        torch_model: what was captured.
        raw_unique: `unique_bytes` of the fresh capture.
        exported: the final graph.
        model_path: its file.
    """
    return Ledger(
        torch_unique_bytes=torch_unique_bytes(torch_model),
        raw_unique_bytes=raw_unique,
        unique_weight_bytes=unique_bytes(exported),
        stored_weight_bytes=stored_bytes(exported),
        runtime_weight_bytes=runtime_bytes(model_path),
        rows=ledger_rows(exported),
        shared=sharing_in_file(exported, shared_bases(torch_model)),
    )
