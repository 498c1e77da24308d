"""Child processes that do not outlive their parent, whatever ends it.

The parent holds the one writing end of a pipe, which is the child's standard input; the system closes it with the
parent. A process that the child forks before it does anything else waits for that: it needs no lock of the child's
interpreter, which a long call may hold, and does not take part in what the child measures. It then ends the child and
removes the temporary folders of both.

Standard library only, and quick to import: it comes before anything that is timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

_DONE = b"done\n"
"""What the parent sends last, if it is there to do so: it has waited for the child, and removes the folders itself."""


def run_watched(command: Sequence[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Runs a child that calls `watch_parent`, and waits for it.

    Args:
        command: the command line.
        timeout: seconds; the child is killed after this.
        options: further ones of `subprocess.run`.

    Raises:
        subprocess.TimeoutExpired: the child was killed.
    """
    from .scratch import live_folders

    reading, writing = os.pipe()
    try:
        os.write(writing, json.dumps(live_folders()).encode() + b"\n")
        return subprocess.run(command, stdin=reading, timeout=timeout, check=False, **options)
    finally:
        os.write(writing, _DONE)
        os.close(reading)
        os.close(writing)


def watch_parent() -> None:
    """In a child of `run_watched`: from now on it ends when its parent does. Called before any thread is started.

    Does nothing where standard input is none of `run_watched`'s.
    """
    if not hasattr(os, "fork"):
        import threading

        threading.Thread(target=_wait_as_a_thread, args=(os.dup(0),), daemon=True).start()
    elif os.fork() == 0:
        try:
            _wait_as_a_process(os.getppid())
        finally:
            os._exit(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _wait_as_a_process(child: int) -> None:
    # a signal to the whole group, as Ctrl-C or `timeout` send it, ends the others: the folders are still to go
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # whoever reads the child's output must not wait for this process
        os.dup2(nothing, stream)
    folders = _orphaned_folders(0)
    if folders is None:
        return
    for _ in range(200):
        if os.getppid() != child:  # it is gone, and its number may be somebody else's
            break
        os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    _remove(folders)


def _wait_as_a_thread(pipe: int) -> None:
    folders = _orphaned_folders(pipe)
    if folders is not None:
        _remove(folders)
        os._exit(1)


def _orphaned_folders(pipe: int) -> list[str] | None:
    """Waits for the end of the pipe; the folders to remove, or None if the parent has ended in good order."""
    told = b""
    while part := os.read(pipe, 1 << 16):
        told += part
    if told.endswith(_DONE):
        return None
    try:
        folders = json.loads(told)
    except ValueError:  # somebody else's standard input
        return None
    return [str(folder) for folder in folders] if isinstance(folders, list) else None


def _remove(folders: Sequence[str]) -> None:
    import shutil

    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
