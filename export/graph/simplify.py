"""Runs a simplifier where it can do no harm, and keeps its result only if nothing got worse (DESIGN §4 rule 7)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.edge_runtime.inference.session import session_on
from edgewright.edge_runtime.process.scratch import Scratch
from edgewright.edge_runtime.process.watched import run_watched
from edgewright.edge_runtime.proof.comparison import compare

from ..accounts.ledger import stored_bytes, unique_bytes
from .capture import rename
from .model_file import save_external

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
Method: TypeAlias = Literal["none", "onnxscript", "onnxsim"]
Command: TypeAlias = Callable[[Path, Path], Sequence[str]]
"""From the files to read and to write to a command line."""


FOLDED_BYTES = 1024
"""Weight bytes that may appear when small computations on constants, such as a scale, are folded."""


def simplify(
    model: ir.Model,
    method: Method,
    feeds: Feeds,
    *,
    abs_tolerance: float = 1e-4,
    rel_tolerance: float = 1e-4,
    timeout: float = 300.0,
    command: Command | None = None,
) -> tuple[ir.Model, str]:
    """Simplifies a flat graph, or gives it back unchanged.

    The result is kept only if the child process ended well in time, ONNX's checker passes, neither nodes, unique
    weight bytes, stored bytes nor `If` nodes grew, inputs and outputs are the same, and every output agrees.

    Args:
        model: the captured graph; not changed.
        method: which simplifier.
        feeds: inputs to compare on.
        abs_tolerance: see `Tolerances`.
        rel_tolerance: see `Tolerances`.
        timeout: seconds for the child process.
        command: the child to run in place of the built-in ones.

    Returns:
        The graph to go on with, and a sentence that says what happened.
    """
    if method == "none" and command is None:
        return model, "simplifier: none asked for"
    label = method if command is None else "custom simplifier"
    with Scratch("edgewright-simplify-") as folder:
        source, target = folder / "in.onnx", folder / "out.onnx"
        save_external(model, source)
        arguments = (command or _command(method))(source, target)
        reason = _run(arguments, target, timeout)
        if reason is None:
            reason = _rejected(model, source, target, feeds, abs_tolerance, rel_tolerance)
        if reason is not None:
            return model, f"{label}: not kept, {reason}"
        simplified = ir.load(target)
        # the tensors of a loaded model may point into the temporary folder
        ir.external_data.load_to_model(simplified)
    rename(simplified.graph)
    before, after = len(list(model.graph)), len(list(simplified.graph))
    return simplified, f"{label}: kept, {before} -> {after} nodes"


def _command(method: Method) -> Command:
    def arguments(source: Path, target: Path) -> Sequence[str]:
        return [sys.executable, "-m", "edgewright.export.graph.simplifier_process", method, str(source), str(target)]

    return arguments


def _run(arguments: Sequence[str], target: Path, timeout: float) -> str | None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = run_watched(arguments, timeout=timeout, capture_output=True, text=True, env=environment)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:g} s"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"it ended with code {done.returncode} ({last[:200]})"
    return None if target.exists() else "it wrote no file"


def _nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _ifs(model: ir.Model) -> int:
    return sum(node.op_type == "If" for node in model.graph.all_nodes())


def _rejected(
    model: ir.Model, source: Path, target: Path, feeds: Feeds, abs_tolerance: float, rel_tolerance: float
) -> str | None:
    """Why the simplified file may not be used, or None."""
    try:
        onnx.checker.check_model(str(target), full_check=True)
        after = ir.load(target)
    except Exception as error:
        return f"the result is no valid model ({str(error).splitlines()[0][:200]})"
    for what, count, slack in (
        ("nodes", _nodes, 0),
        ("If nodes", _ifs, 0),
        ("unique weight bytes", unique_bytes, FOLDED_BYTES),
        ("stored weight bytes", stored_bytes, FOLDED_BYTES),
    ):
        old, new = count(model), count(after)
        if new > old + slack:
            return f"{what} grew from {old} to {new}"
    for side in ("inputs", "outputs"):
        old_names = [v.name for v in getattr(model.graph, side)]
        new_names = [v.name for v in getattr(after.graph, side)]
        if old_names != new_names:
            return f"{side} changed from {old_names} to {new_names}"
    names = [v.name or "" for v in model.graph.outputs]
    try:
        old_values, new_values = (session_on(path, threads=1).run(feeds) for path in (source, target))
    except EdgewrightError as error:
        return f"ONNX Runtime does not run it ({str(error).splitlines()[0][:200]})"
    for name in names:
        result = compare(new_values[name], old_values[name], abs_tol=abs_tolerance, rel_tol=rel_tolerance)
        if not result.passed:
            return f"output {name} changed: {result.text()}"
    return None
