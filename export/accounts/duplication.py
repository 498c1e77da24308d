"""Refuses a file that stores more than the model does (DESIGN §4 rule 4).

What the fresh capture reads is the measure: layers that do not run are not in it, constants of a user's forward are.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
from torch import nn

from edgewright.edge_runtime.bundle.manifest import THRESHOLDS, Ledger
from edgewright.edge_runtime.errors import ExportError

from ..graph.simplify import FOLDED_BYTES
from .ledger import (
    constant_bytes,
    graphs,
    is_level_copy,
    level_copy_bytes,
    shared_bases_that_run,
    sharing_in_file,
    stored_bytes,
)

_ADVICE = "set export.simplify to none, and please report it"


def check_duplication(
    torch_model: nn.Module, raw: ir.Model, exported: ir.Model, runtime: ir.Model | None, ledger: Ledger
) -> tuple[str, ...]:
    """Holds the bytes and the shared bases of every step to the model's.

    Args:
        torch_model: what was captured.
        raw: the fresh capture.
        exported: the final graph; copies that `shared_across_exits: latency` asked for are known by their names.
        runtime: the same as ONNX Runtime optimized it, None if that is not known.
        ledger: of these.

    Returns:
        A note if ONNX Runtime holds more weight bytes than the file because it computes with constants, or if what it
        holds is not known.

    Raises:
        ExportError: a weight or a shared basis was duplicated; says on which step and what to do.
    """
    copies = level_copy_bytes(exported)
    allowed = stored_bytes(raw) + _threshold_bytes(exported) + copies + FOLDED_BYTES
    if ledger.stored_weight_bytes > allowed:
        raise ExportError(
            f"the exported file stores {ledger.stored_weight_bytes} weight bytes, the model as it was captured needs "
            f"{allowed - FOLDED_BYTES}: a weight was duplicated on the way; {_ADVICE}"
        )
    wanted = shared_bases_that_run(torch_model, raw)
    for step, found in (("the fresh capture", sharing_in_file(raw, torch_model)), ("the exported file", ledger.shared)):
        for name, modules in wanted.items():
            if tuple(found.get(name, ())) != modules:
                raise ExportError(
                    f"the basis {name} is shared by {', '.join(modules)} in PyTorch and by "
                    f"{', '.join(found.get(name, ())) or 'none of them'} in {step}: its copies would cost the bytes "
                    f"that sharing saved; {_ADVICE}"
                )
    if runtime is None or ledger.runtime_weight_bytes is None:
        return ("the file is too large for ONNX Runtime to write down what it makes of it: not held to sharing",)
    for name in wanted:
        _check_runtime(name, exported, runtime)
    if ledger.runtime_weight_bytes <= ledger.stored_weight_bytes + constant_bytes(exported) + FOLDED_BYTES:
        return ()
    return (
        f"ONNX Runtime holds {ledger.runtime_weight_bytes} weight bytes after its own optimizations, the file "
        f"{ledger.stored_weight_bytes}: it computes with constants when it loads the model, and keeps the results",
    )


def _threshold_bytes(model: ir.Model) -> int:
    value = model.graph.initializers.get(THRESHOLDS)
    return 0 if value is None or value.const_value is None else int(value.const_value.nbytes)


def _check_runtime(name: str, exported: ir.Model, runtime: ir.Model) -> None:
    """A basis that ONNX Runtime keeps in a second order, transposed say, is as much a copy as an equal one."""
    values = [v for _, graph in graphs(exported.graph) for v in graph.initializers.values()]
    basis = next(v.const_value for v in values if v.name == name or is_level_copy(v, name))
    assert basis is not None
    contents = _contents(basis)
    before, after = (
        sum(
            value.const_value is not None
            and value.const_value.nbytes == basis.nbytes
            and _contents(value.const_value) == contents
            for _, graph in graphs(model.graph)
            for value in graph.initializers.values()
        )
        for model in (exported, runtime)
    )
    if after > before:
        raise ExportError(
            f"ONNX Runtime holds the shared basis {name} {after} times after its own optimizations, the file "
            f"{before} times: {_ADVICE}"
        )


def _contents(tensor: ir.TensorProtocol) -> str:
    """A hash of the numbers in any order."""
    return hashlib.sha256(np.sort(tensor.numpy(), axis=None).tobytes()).hexdigest()
