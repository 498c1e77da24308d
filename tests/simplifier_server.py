"""The simplifier's child process, forked from one server that has loaded what it needs.

An export starts a process of its own to simplify, of whose 1.5 seconds nearly all go into loading. Here every request
is answered by a fork, which is a process of its own too; tests/export/graph/test_simplify.py keeps the real one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgewright.export.graph import simplify

REAL_RUN = simplify._run

_MODULE = "edgewright.export.graph.simplifier_process"
_SERVER = f"""
import json, os, sys
import onnx, onnx_ir, onnxscript.optimizer
from edgewright.export.graph import model_file
import {_MODULE} as process

process.watch_parent = lambda: None  # it is the server's children that end with it
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv[1:] = json.loads(line)
            process.main()
            code = 0
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
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.kill)
    return server


def run(arguments: Sequence[str], target: Path, timeout: float) -> str | None:
    """In place of `simplify._run`; what the server cannot do, or what failed in it, is done as ever."""
    if list(arguments[1:3]) == ["-m", _MODULE] and arguments[3] == "onnxscript":
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(list(arguments[3:])) + "\n")
        server.stdin.flush()
        if server.stdout.readline().strip() == "0" and target.exists():
            return None
    return REAL_RUN(arguments, target, timeout)
