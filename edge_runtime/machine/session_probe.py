"""Whether ONNX Runtime can make a session here at all: tried with a tiny model, in a process of its own.

It may be imported and still be of no use: a library that another build has overwritten, a processor that lacks the
instructions, an empty folder that an uninstallation left. Some of that ends the process, which `doctor` must survive.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ProviderError
from ..measure.child import how_it_ended, process_command
from ..process.watched import run_watched
from .numpy_abi import import_onnxruntime

_MODEL = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020802620f0a0179120a0a08080112040a02"
    "080242040a00100d"
)
"""y = x + x for float32 [2], opset 13, IR 7: any ONNX Runtime of the last years reads it."""

_TIMEOUT_S = 60.0
_MARK = "edgewright-probe "
_TAIL = 400


@dataclass(frozen=True)
class Probe:
    """What came of it.

    Attributes:
        imported: whether ``import onnxruntime`` works, and gives what a runtime has.
        problem: why there is no session, in a sentence; None: there is one, and it computes.
        advised: whether `problem` says what helps, too.
    """

    imported: bool
    problem: str | None
    advised: bool = False


def probe_session() -> Probe:
    """Makes a session of a tiny model on the CPU and runs it, in a fresh process."""
    try:
        command = process_command(".machine.session_probe")
        done = run_watched(command, timeout=_TIMEOUT_S, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return Probe(False, f"making a session of a tiny model does not end in {_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Probe(False, f"{sys.executable} cannot be started to try a session ({error})")
    stages = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if stages and stages[-1].startswith("{"):
        answer = json.loads(stages[-1])
        return Probe(**answer)
    what = {0: "importing onnxruntime", 1: "making a session of a tiny model"}.get(len(stages), "running a tiny model")
    said = " ".join(done.stderr.split())[-_TAIL:]
    return Probe(bool(stages), how_it_ended(done.returncode, f"the process {what}") + (f": {said}" if said else ""))


def main(_started_ns: int) -> None:
    """Entry of the process: prints how far it has come, and last what it found."""
    with _own_words():
        problem, imported, advised = None, False, False
        try:
            onnxruntime = import_onnxruntime()
            make = onnxruntime.InferenceSession
            imported = True
            _say("imported")
            problem = _problem(onnxruntime, make)
        except ProviderError as error:
            problem, advised = str(error), True
        except Exception as error:  # whatever a broken installation raises is the answer
            what = "no session of a tiny model can be made" if imported else "onnxruntime cannot be imported"
            problem = f"{what} ({type(error).__name__}: {str(error)[:_TAIL]})"
        _say(json.dumps({"imported": imported, "problem": problem, "advised": advised}))


def _problem(onnxruntime: Any, make: Any) -> str | None:
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = make(_MODEL, options, providers=["CPUExecutionProvider"])
    _say("session")
    (y,) = session.run(None, {"x": np.array([1, 2], np.float32)})
    wanted = [2.0, 4.0]
    return None if np.asarray(y).tolist() == wanted else f"a tiny model answers {y!r:.80} where {wanted} is right"


def _say(text: str) -> None:
    print(_MARK + text, flush=True)


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """Ends the process before libraries that may be broken are taken down."""
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
