"""A fresh process for every measurement, whose crash or hang is a result and not an accident.

The parent may have imported torch, whose thread pool would fight ONNX Runtime's; the child imports this
package, numpy and onnxruntime. It works alike from a source tree, an installation and inside
edge_runtime.pyz.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..bundle.bundle import Bundle
from ..bundle.golden import read_npz
from ..bundle.manifest import MANIFEST_FILE
from ..inference.options import SessionOptions
from ..process.scratch import Scratch
from ..process.watched import run_watched
from .measuring import Feed, write_feeds

_PACKAGE = (__package__ or "edge_runtime.measure").rpartition(".")[0]
"""edge_runtime, by the name that it has here."""
# `python -c` puts the working folder first on the path, where a user's own `models` or `numpy.py` may lie.
_START = (
    "import sys, time; "
    "sys.path[:] = [p for p in sys.path if p]; "
    "sys.argv[1] in sys.path or sys.path.insert(0, sys.argv[1]); "
    "import importlib; importlib.import_module(sys.argv[2] + '.process.watched').watch_parent(); "
    "started = time.perf_counter_ns(); "
    "importlib.import_module(sys.argv[2] + sys.argv[3]).main(started, *sys.argv[4:])"
)
_TAIL = 2000
_MOST_RUNS = 1_000_000


@dataclass(frozen=True)
class Artefact:
    """What the child is to load.

    Attributes:
        name: for the report.
        model: the ONNX file.
        feeds: inputs, one mapping a run.
        bundle: what it comes from, if that is a bundle.
        options: of its session.
    """

    name: str
    model: Path
    feeds: Sequence[Feed]
    bundle: Bundle | None
    options: SessionOptions


@dataclass(frozen=True)
class ChildResult:
    """What came back: `status` is ``ok``, ``crashed`` or ``timeout``, with the reason unless ok."""

    status: str
    reason: str | None
    answer: Mapping[str, Any]
    samples: NDArray[np.int64]
    exits: NDArray[np.int64]


def block_settings(
    mode: str,
    options: SessionOptions,
    *,
    blocks: int,
    block_runs: int,
    warmup_seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The child's settings where it measures in blocks; arguments as in `interleave.interleaved`.

    Raises:
        InputError: a number of blocks or runs that is not positive, or a seed that is negative.
    """
    if not 1 <= blocks <= _MOST_RUNS or not 1 <= block_runs <= _MOST_RUNS:
        raise errors.InputError(
            f"blocks and block_runs are numbers from 1 to {_MOST_RUNS}, not {blocks} and {block_runs}"
        )
    check_seed(seed)
    return {
        "mode": mode,
        **options.of_the_machine(),
        "blocks": blocks,
        "block_runs": block_runs,
        "warmup_seconds": warmup_seconds,
        "seed": seed,
    }


def check_seed(seed: int) -> None:
    """Refuses what numpy's generators do not take.

    Raises:
        InputError: it is negative.
    """
    if seed < 0:
        raise errors.InputError(f"the seed is a number from 0 on, not {seed}")


def run_child(artefacts: Sequence[Artefact], settings: Mapping[str, Any], timeout_s: float) -> ChildResult:
    """Measures in a fresh process.

    Args:
        artefacts: at least one.
        settings: the rest of `measuring.main`'s spec.
        timeout_s: the child is killed after this.

    Raises:
        EdgewrightError: whatever the child raised on purpose, with the same class and text.
    """
    with Scratch("edgewright-bench-") as folder:
        try:
            spec_path = _write_spec(folder, artefacts, settings)
        except OSError as error:
            raise errors.InputError(
                f"the inputs cannot be written to {folder}: {error.strerror or error}; set TMPDIR to a larger disk"
            ) from None
        with (folder / "output").open("wb") as output:
            try:
                done = run_watched(
                    child_command(spec_path),
                    timeout=timeout_s,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            except subprocess.TimeoutExpired:
                return _failed("timeout", f"the measuring process was stopped after {timeout_s:g} s")
        answer_path = folder / "answer.json"
        if done.returncode != 0 or not answer_path.exists():
            tail = (folder / "output").read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
            return _failed("crashed", how_it_ended(done.returncode) + (f": {tail}" if tail else ""))
        answer = json.loads(answer_path.read_text(encoding="utf-8"))
        if "error" in answer:
            raise getattr(errors, answer["error"]["kind"], errors.EdgewrightError)(answer["error"]["message"])
        arrays = read_npz(folder / "samples.npz")
        return ChildResult("ok", None, answer, arrays["samples"], arrays["exits"])


def child_command(spec_path: Path) -> list[str]:
    """The command line of the measuring process."""
    return process_command(".measure.measuring", str(spec_path))


def process_command(module: str, *arguments: str) -> list[str]:
    """The command line of a process that runs ``main`` of one of edge_runtime's modules.

    Args:
        module: its name in the package, with a dot in front.
        arguments: what ``main`` gets after the time at which it was started, ``time.perf_counter_ns()``.
    """
    root = Path(__file__).parents[len(_PACKAGE.split(".")) + 1]
    isolated = ["-I"] if sys.flags.isolated else []
    return [sys.executable, *isolated, "-c", _START, str(root), _PACKAGE, module, *arguments]


def _write_spec(folder: Path, artefacts: Sequence[Artefact], settings: Mapping[str, Any]) -> Path:
    entries = []
    for index, artefact in enumerate(artefacts):
        inputs = folder / f"inputs{index}.npz"
        write_feeds(inputs, artefact.feeds)
        entry = {
            "name": artefact.name,
            "model": str(artefact.model.resolve()),
            "manifest": str(artefact.bundle.path(MANIFEST_FILE).resolve()) if artefact.bundle else None,
            "manifest_sha256": artefact.bundle.sha256 if artefact.bundle else None,
            "inputs": str(inputs),
            "options": asdict(artefact.options),
        }
        entries.append(entry)
    path = folder / "spec.json"
    path.write_text(json.dumps({**settings, "result": str(folder), "artefacts": entries}), encoding="utf-8")
    return path


def _failed(status: str, reason: str) -> ChildResult:
    return ChildResult(status, reason, {}, np.zeros(0, np.int64), np.zeros(0, np.int64))


def how_it_ended(returncode: int, what: str = "the measuring process") -> str:
    """A sentence on how `what` ended, from its return code as `subprocess` has it."""
    if returncode >= 0:
        return f"{what} ended with exit code {returncode}"
    known = {member.value: member.name for member in signal.Signals}
    return f"{what} was ended by {known.get(-returncode, f'signal {-returncode}')}"
