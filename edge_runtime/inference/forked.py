"""Sessions in a process that was forked from the one that made them.

ONNX Runtime's threads stay behind in the parent. Three things then wait for them for ever: a session that is destroyed,
the library itself when the process ends, and, now and then, a run. So the child lets go of such a session without
destroying it, ends without the library's own clearing up, and whoever runs the session is told what to do instead. A
session of one thread has no others to lose, and goes on working.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import weakref
from typing import Any, NoReturn

from ..errors import EdgewrightError

_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def abandon_in_forks(session: Any, threads: int | None) -> None:
    """From now on a process that is forked from this one does not destroy `session`, and runs it only with one thread.

    Args:
        session: an ONNX Runtime session.
        threads: that it was made with; None: ONNX Runtime's choice.
    """
    _sessions.add(session)
    session.edgewright_threads = threads


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise EdgewrightError(
        "this process was forked from one that had loaded the model, and ONNX Runtime's threads stayed there: load it "
        "in the worker, after the fork (gunicorn: without --preload, or in post_fork; multiprocessing: in the "
        "initializer, or with the start method 'spawn'), or load it with threads=1, which has no threads to lose"
    )


def _abandon() -> None:
    """In the child, right after the fork."""
    for session in list(_sessions):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))  # never given back
        if session.edgewright_threads != 1:
            for name in ("run", "run_async", "run_with_iobinding", "run_with_ort_values", "io_binding"):
                setattr(session, name, _refuse)
    if "onnxruntime" in sys.modules:
        _end_without_destructors()


def _end_without_destructors() -> None:
    """When Python has ended in good order, the process ends at once, with the same exit code.

    Handlers run in reverse order, and those of libraries that were loaded before come after these.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such functions, and do not wait
        c = ctypes.CDLL(None)
        # on_exit calls with the exit code, which is just what _exit takes
        c.on_exit(c._exit, None)
        c.on_exit(c.fcloseall, None)  # runs first: what C code has printed is still written


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon)
