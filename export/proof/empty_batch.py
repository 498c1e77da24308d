"""Whether a file can run a batch without rows, which an operator of the first level may not be able to.

Tried in a process of its own: a kernel that divides by the number of rows ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import onnx_ir as ir

from edgewright.edge_runtime.bundle.golden import write_npz
from edgewright.edge_runtime.process.scratch import Scratch

from ..graph.model_file import save_external
from ..graph.simplify import Feeds

_LEVELS = ("disabled", "all")
_TIMEOUT_S = 300.0
_PROGRAM = """
import sys
sys.path[:] = [p for p in sys.path if p]  # not the working folder, where a user may have a numpy.py
import numpy
from edgewright.edge_runtime.inference.session import session_on
path, feeds, *levels = sys.argv[1:]
with numpy.load(feeds) as arrays:
    nothing = {name: arrays[name] for name in arrays.files}
for level in levels:
    outputs = session_on(path, threads=1, optimization_level=level).run(nothing)
    if any(value.shape[0] != 0 for value in outputs.values()):
        sys.exit("not empty")
"""


def takes_no_rows(model: ir.Model, feeds: Feeds) -> bool:
    """Whether every output has 0 rows for inputs with 0 rows, unoptimized and fully optimized.

    Args:
        model: with any number of rows in axis 0 of its inputs and outputs.
        feeds: inputs with some rows.
    """
    with Scratch("edgewright-empty-") as folder:
        path, arrays = folder / "model.onnx", folder / "feeds.npz"
        save_external(model, path)
        write_npz(arrays, {name: array[:0] for name, array in feeds.items()})
        arguments = [sys.executable, "-c", _PROGRAM, str(path), str(arrays), *_LEVELS]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        try:
            done = subprocess.run(arguments, capture_output=True, timeout=_TIMEOUT_S, env=environment, check=False)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
