"""Workers that are forked after a model was loaded, each in a process tree of its own: they must end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import load, pack_zip

CODE = """
import json, os, sys
import numpy as np
from edgewright import edge_runtime

bundle, threads, what = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
x = np.zeros((1, 3, 6, 6), np.float32)
runner = edge_runtime.load(bundle, threads=threads)
if what == "gone":
    runner.close()
    del runner
child = os.fork()
if child == 0:
    try:
        if what == "own":
            runner = edge_runtime.load(bundle, threads=threads)
        if what == "close":
            runner.close()
        elif what != "gone":
            print("answers", runner.predict(x).label.tolist(), flush=True)
    except edge_runtime.EdgewrightError as error:
        print("refuses", error, flush=True)
    sys.exit(7)
print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
if what != "gone":
    print("parent", runner.predict(x).label.tolist(), runner.owned_bundle.path("golden.npz").is_file())
"""


def _run(bundle: Path, threads: int | None, what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(bundle), json.dumps(threads), what], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("threads", [1, 4, None])
def test_a_forked_worker_answers_or_says_what_helps(bundle: Path, tmp_path: Path, threads: int | None) -> None:
    pack_zip(bundle, tmp_path / "b.zip")
    with load(bundle) as runner:
        label = runner.predict(np.zeros((1, 3, 6, 6), np.float32)).label.tolist()
    said, ended, parent = _run(tmp_path / "b.zip", threads, "use")
    if threads == 1:
        assert said == f"answers {label}"
    else:
        assert said.startswith("refuses") and "load it in the worker" in said and "threads=1" in said
    assert ended == "ended with 7"
    assert parent == f"parent {label} True"  # with its temporary folder


@pytest.mark.parametrize("what", ["own", "close", "gone"])
def test_a_forked_worker_ends_whatever_it_does(bundle: Path, what: str) -> None:
    lines = _run(bundle, None, what)
    assert "ended with 7" in lines
    assert lines[0].startswith("answers") == (what == "own")
