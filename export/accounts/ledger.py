"""Where the weight bytes are at each step of the export; proves that what is shared stays shared (DESIGN §4 rule 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from edgewright.edge_runtime.bundle.manifest import Ledger, LedgerRow
from edgewright.edge_runtime.process.scratch import Scratch
from edgewright.models.layers.factorized import SharedBasis
from edgewright.models.layers.recurrent import OpenRecurrent

from ..exits.weight_placement import LEVEL_MARK
from ..graph.capture import module_of
from ..graph.model_file import EXTERNAL_ABOVE, data_file

_MOVING = ("Identity", "Transpose", "Reshape", "Slice")
"""What may stand between a projection and the operator that reads it: steps backwards, axes in another order."""


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
    digest = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape)}".encode())
    digest.update(tensor.tobytes())
    return digest.hexdigest()


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all weight initializers in all nested graphs, copies counted; shapes and masks are no weights."""
    return sum(tensor.nbytes for _, _, tensor in _initializers(model))


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all `Constant` nodes that a runtime holds as it holds weights."""
    tensors = (n.attributes["value"].as_tensor() for n in model.graph.all_nodes() if "value" in n.attributes)
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype not in _NO_WEIGHTS)


def unique_bytes(*models: ir.Model) -> int:
    """Bytes of distinct weight initializer contents of one model, or of several together."""
    return sum({_digest(t): t.nbytes for model in models for _, _, t in _initializers(model)}.values())


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
    names: dict[int, str] = {}
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for child, basis in module.named_children():
            if isinstance(basis, SharedBasis):
                names.setdefault(id(basis), f"{path}.{child}.weight".removeprefix("."))
                users.setdefault(id(basis), []).append(path)
    return {names[key]: tuple(paths) for key, paths in users.items() if len(paths) > 1}


def shared_bases_that_run(model: nn.Module, raw: ir.Model) -> dict[str, tuple[str, ...]]:
    """`shared_bases` without the modules whose coefficients the fresh capture does not read: forward skips them."""
    running = {
        name: tuple(m for m in modules if f"{m}.coefficients".removeprefix(".") in raw.graph.initializers)
        for name, modules in shared_bases(model).items()
    }
    return {name: modules for name, modules in running.items() if len(modules) > 1}


def sharing_in_file(model: ir.Model, torch_model: nn.Module, copies: bool = False) -> dict[str, tuple[str, ...]]:
    """The shared bases that the graph stores once, with the factorized modules that use them there.

    Args:
        model: a graph of `torch_model`, flat or nested.
        torch_model: says what is shared.
        copies: a basis may lie in several of the nested graphs, once in each.
    """
    bases = shared_bases(torch_model)
    if not bases:
        return {}  # nothing is shared: spares hashing all weights
    owned = set(torch_model.state_dict())
    recurrent = [path for path, module in torch_model.named_modules() if isinstance(module, OpenRecurrent)]
    found = {}
    everything = [(path, value, _digest(tensor)) for path, value, tensor in _initializers(model)]
    nodes = list(model.graph.all_nodes())
    for name, modules in bases.items():
        contents = {digest for _, value, digest in everything if value.name == name or is_level_copy(value, name)}
        # another parameter may happen to hold the same numbers; whatever else does is a copy
        holders = [(path, v) for path, v, digest in everything if digest in contents and v.name not in owned - {name}]
        places = [path for path, _ in holders]
        readers = {node for _, value in holders for node, _ in value.uses()}
        users = tuple(
            m for m in modules if _uses(nodes, readers, m) or _is_in_an_operator(nodes, readers, m, recurrent)
        )
        if len(places) == (len(set(places)) if copies else 1) and len(users) > 1:
            found[name] = users
    return found


def is_level_copy(value: ir.Value, name: str) -> bool:
    """Whether `value` is the copy of the initializer `name` that a deeper level has of its own."""
    return (value.name or "").startswith(f"{name}{LEVEL_MARK}")


def level_copy_bytes(model: ir.Model) -> int:
    """Bytes of the copies that `place_initializers` made on purpose."""
    return sum(tensor.nbytes for _, value, tensor in _initializers(model) if LEVEL_MARK in (value.name or ""))


def _uses(nodes: Sequence[ir.Node], readers: Collection[ir.Node], module: str) -> bool:
    """Whether a node of `module` reads the basis, or what a reader of it has made."""
    coefficients = f"{module}.coefficients".removeprefix(".")
    for node in nodes:
        inputs = [v for v in node.inputs if v is not None]
        if module_of(node) != module and not any(
            v.name == coefficients or is_level_copy(v, coefficients) for v in inputs
        ):
            continue
        if node in readers or any(v.producer() in readers for v in inputs):
            return True
    return False


def _is_in_an_operator(
    nodes: Sequence[ir.Node], readers: Collection[ir.Node], module: str, recurrent: Sequence[str]
) -> bool:
    """Whether `module` is the input layer of an LSTM or a GRU whose operator reads what the basis has multiplied.

    Its coefficients are the operator's own weights then, put into the order that ONNX wants.
    """
    owner = next((path for path in recurrent if module.startswith(f"{path}.")), None)
    if owner is None:
        return False
    for node in nodes:
        if node.op_type in ("LSTM", "GRU") and f"{module_of(node)}.".startswith(f"{owner}."):
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            while producer is not None and producer.op_type in _MOVING and producer.inputs[0] is not None:
                producer = producer.inputs[0].producer()
            if producer in readers:
                return True
    return False


def optimized(model_path: Path) -> ir.Model | None:
    """The graph after ONNX Runtime's basic optimizations on the CPU; None if it is too large for one file.

    (ONNX Runtime 1.31.1 can write its weights to a file of their own, but then declares constants of branches twice.)
    Basic, because the extended level fuses and the full level reorders convolution weights for this processor: both
    say nothing about duplication on another.
    """
    import onnxruntime

    files = (model_path, data_file(model_path))
    if sum(file.stat().st_size for file in files if file.exists()) > EXTERNAL_ABOVE:
        return None
    with Scratch("edgewright-ledger-") as folder:
        target = folder / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        return ir.load(target)


def build_ledger(
    torch_model: nn.Module, raw: ir.Model, exported: ir.Model, runtime: ir.Model | None, copies: bool
) -> Ledger:
    """The whole ledger for a manifest.

    Args:
        torch_model: what was captured.
        raw: the fresh capture.
        exported: the final graph.
        runtime: as `optimized` gives it.
        copies: see `sharing_in_file`.
    """
    return Ledger(
        torch_unique_bytes=torch_unique_bytes(torch_model),
        raw_unique_bytes=unique_bytes(raw),
        unique_weight_bytes=unique_bytes(exported),
        stored_weight_bytes=stored_bytes(exported),
        runtime_weight_bytes=None if runtime is None else stored_bytes(runtime),
        rows=ledger_rows(exported),
        shared=sharing_in_file(exported, torch_model, copies),
    )
