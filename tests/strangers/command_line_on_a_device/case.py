"""Commands that are killed, and commands whose output nobody takes."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import small_bundle

from edgewright.edge_runtime import pack_zip

EDGEWRIGHT = Path(sys.executable).parent / "edgewright"
good = small_bundle.make(Path("good").absolute())
pack_zip(good, "good.zip")


def left_in(place):
    """Names in a temporary folder, without the mark that ONNX Runtime itself puts into any."""
    return [path.name for path in Path(place).iterdir() if path.name != ".ses"]


def tell(name, right, what):
    print(f"{'right' if right else 'wrong'} {name}: {' '.join(str(what).split())[:110]!r}", flush=True)


def descendants(place):
    """Processes that have `place` as their temporary folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={place}\0".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


SIMPLIFY = """
import sys, torch, numpy as np
from pathlib import Path
from edgewright.export.graph.capture import capture
from edgewright.export.graph.simplify import simplify
code = (
    "from edgewright.edge_runtime.process.watched import watch_parent; watch_parent(); "
    "import time; print(1); time.sleep(90)"
)
model = capture(torch.nn.Linear(4, 2), (torch.randn(1, 4),), ["x"])
simplify(model, "onnxsim", {"x": np.ones((1, 4), np.float32)}, command=lambda *_: [sys.executable, "-c", code])
"""


def kills():
    bench = [EDGEWRIGHT, "bench", "good.zip", "--min-seconds", "100"]
    table = [EDGEWRIGHT, "latency-table", "good.zip", "--blocks", "1000000"]
    for name, command, number in (
        ("bench, SIGKILL", bench, signal.SIGKILL),
        ("bench, SIGTERM", bench, signal.SIGTERM),
        ("latency-table, SIGINT", table, signal.SIGINT),
        ("simplifier, SIGKILL", [sys.executable, "-c", SIMPLIFY], signal.SIGKILL),
    ):
        with tempfile.TemporaryDirectory() as place:
            process = subprocess.Popen(
                command, env={**os.environ, "TMPDIR": place}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            # itself, its child, and what watches it
            began = until(lambda p=place: len(descendants(p)) > 2 and any(Path(p).iterdir()), 60)
            process.send_signal(number)
            process.wait()
            gone = until(lambda p=place: not descendants(p) and not left_in(p), 20)
            left = left_in(place)
            for pid in descendants(place):
                os.kill(pid, signal.SIGKILL)
            tell(f"killed {name}", began and gone, f"began {began}, left {left}" if not gone else "nothing is left")


def outputs():
    for name, command, wanted in (
        ("verify | head -1", "verify good | head -1", 0),
        ("verify, reader gone", "verify good > >(exec true)", 0),
        ("verify, closed", "verify good >&-", 0),
        ("verify, all closed", "verify good <&- >&- 2>&-", 0),
        ("verify of nothing, stderr full", "verify nothing 2>/dev/full", 2),
        ("verify of nothing, stderr closed", "verify nothing 2>&-", 2),
        ("predict, disk full", "predict good x.npy >/dev/full", 2),
        ("models | head -1", "models | head -1", 0),
    ):
        text = f"{shlex.quote(str(EDGEWRIGHT))} {command}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=100)
        said = done.stdout + done.stderr
        quiet = "Traceback" not in said and "internal" not in said and "Exception ignored" not in said
        words = "No space left" in said or "full" not in name or "stderr" in name
        tell(name, done.returncode == wanted and quiet and words, f"exit {done.returncode} {done.stderr[:80]}")


for case in (kills, outputs):
    try:
        case()
    except Exception as error:
        tell(case.__name__, False, f"{type(error).__name__}: {error}")
