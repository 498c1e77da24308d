from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgewright.edge_runtime.process.scratch import Scratch, live_folders
from edgewright.edge_runtime.process.watched import run_watched

CHILD = """
import os, time
told = os.dup(1)  # stays open in whatever the child forks, so that the test can wait for all of it
from edgewright.edge_runtime.process.watched import watch_parent
watch_parent()
print("measuring", flush=True)
time.sleep(60)
"""
PARENT = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from edgewright.edge_runtime.process.scratch import Scratch
from edgewright.edge_runtime.process.watched import run_watched
with Scratch("edgewright-test-") as folder:
    print(folder, flush=True)
    run_watched([sys.executable, "-c", {CHILD!r}], timeout=60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_and_the_folders_go_with_the_parent(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        folder = Path(parent.stdout.readline().strip())
        assert parent.stdout.readline() == "measuring\n" and folder.is_dir()
        parent.send_signal(number)
        assert parent.stdout.read() == ""  # its end: nobody is left who could write
    assert not folder.exists()


def test_a_child_that_ends_leaves_the_folders_to_the_parent() -> None:
    code = (
        "from edgewright.edge_runtime.process.watched import watch_parent; watch_parent(); import sys; "
        "print(sys.stdin.read())"
    )
    with Scratch("edgewright-test-") as folder:
        done = run_watched([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
        assert done.stdout == "\n" and done.returncode == 0, done.stderr
        assert folder.is_dir() and str(folder) in live_folders()
    assert not folder.exists() and str(folder) not in live_folders()


def test_a_process_that_was_not_started_so_is_left_alone() -> None:
    code = "from edgewright.edge_runtime.process.watched import watch_parent; watch_parent(); print(input.__name__)"
    for given in ("", "some text\n", "[not json"):
        done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True)
        assert done.stdout == "input\n" and done.returncode == 0, done.stderr


def test_a_forked_process_does_not_remove_what_its_parent_uses() -> None:
    scratch = Scratch("edgewright-test-")
    child = os.fork()
    if child == 0:
        scratch.cleanup()
        os._exit(0)
    os.waitpid(child, 0)
    assert scratch.path.is_dir()
    scratch.cleanup()
    assert not scratch.path.exists()
