"""Inputs that strangers bring: every folder of ``tests/strangers`` in a process of its own, with a time limit.

A case is a folder with a ``case.py``. It runs in a copy of the folder, and prints one line for each of its inputs,
``right NAME: what was seen`` or ``wrong NAME: what was seen``. A case that dies, hangs or says nothing is a wrong input
of its own. ``wrong_of_N`` is the number of wrong inputs, N all of them; the exit code is 1 unless it is 0.

    python benchmarks/strangers.py                     # all
    python benchmarks/strangers.py --only images loops # folders whose name has one of these in it
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, arguments, report

CASES = Path(__file__).parents[1] / "tests" / "strangers"


@dataclass(frozen=True)
class Seen:
    """What came of one input of a case."""

    case: str
    name: str
    right: bool
    what: str


def run_case(folder: Path, limit_s: float) -> tuple[list[Seen], float]:
    """Runs one case in a copy of its folder; also says how many seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stranger-") as place:
        work = Path(place) / folder.name
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns("__pycache__"))
        log = Path(place) / "stderr"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "case.py"],
                cwd=work,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                out, _ = process.communicate(timeout=limit_s)
                ended = None if process.returncode == 0 else f"ended with {process.returncode}: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                out, ended = b"", f"not finished after {limit_s:.0f} s"
            finally:
                _end(process)
    seen = list(_lines(folder.name, out.decode(errors="replace")))
    if ended is not None or not seen:
        seen.append(Seen(folder.name, "-", False, ended or "said nothing"))
    return seen, time.monotonic() - started


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the case and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "nothing on stderr"


def _lines(case: str, out: str) -> Iterator[Seen]:
    for line in out.splitlines():
        verdict, _, rest = line.partition(" ")
        if verdict in ("right", "wrong"):
            name, _, what = rest.partition(": ")
            yield Seen(case, name, verdict == "right", what)


def main() -> int:
    """Runs the cases and prints the table."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cases with PART in their name")
        parser.add_argument("--workers", type=int, default=2, help="cases side by side")
        parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="of one case")

    options = arguments(__doc__ or "", more)
    folders = sorted(f.parent for f in CASES.glob("*/case.py") if any(part in f.parent.name for part in options.only))
    if not folders:
        print(f"no case in {CASES} has {' or '.join(options.only)} in its name", file=sys.stderr)
        return 2
    everything: list[Seen] = []
    with ThreadPoolExecutor(options.workers) as pool:
        for folder, (seen, seconds) in zip(
            folders, pool.map(lambda f: run_case(f, options.limit), folders), strict=True
        ):
            everything += seen
            for one in seen:
                print(f"{'right' if one.right else 'WRONG'}  {folder.name:<34} {one.name:<34} {one.what}")
            print(f"       {folder.name:<34} {seconds:.0f} s", flush=True)
    wrong = [one for one in everything if not one.right]
    count = float(len(wrong))
    report("strangers", {f"wrong_of_{len(everything)}": Figure(count, count, count)}, options.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
