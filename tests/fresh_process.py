"""Logits of a checkpoint, computed by a process that has never seen the model.

Every call is answered by a fork of one server, which has loaded torch and nothing else: loading it anew for each
check would cost more than the checks.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SERVER = """
import json, os, sys, traceback
from pathlib import Path
import numpy as np, torch
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.pipeline.store.checkpoint import load_checkpoint

def answer(folder, root, given, found, threads):
    os.chdir(Path(given).parent)
    torch.set_num_threads(threads)
    arrays = np.load(given)
    inputs = [torch.from_numpy(arrays[name]) for name in sorted(arrays.files)]
    model = load_checkpoint(Path(folder), Path(root))
    with torch.no_grad():
        logits = model.all_logits(*inputs) if isinstance(model, MultiExit) else [model(*inputs)]
    np.savez(found, *[x.numpy() for x in logits])

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        arguments = json.loads(line)
        code = 1
        try:
            answer(**arguments)
            code = 0
        except BaseException:
            Path(arguments["found"]).with_suffix(".txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


def logits_in_a_fresh_process(checkpoint: Path, root: Path, inputs: tuple[Tensor, ...]) -> list[NDArray[np.float32]]:
    """Loads `checkpoint`, whose model's file lies in `root`, and runs it; AssertionError with the child's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "inputs.npz"), Path(folder, "logits.npz")
        np.savez(given, **{f"{i:03d}": x.numpy() for i, x in enumerate(inputs)})
        arguments = {
            "folder": str(checkpoint),
            "root": str(root),
            "given": str(given),
            "found": str(found),
            "threads": torch.get_num_threads(),
        }
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(arguments) + "\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        error = found.with_suffix(".txt")
        assert code == "0", error.read_text() if error.exists() else f"the process ended with code {code!r}"
        with np.load(found) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
