"""Any architecture through every stage: one process a cell, architectures x {export, prune, share, exits, chain}.

A cell is a recipe on a tiny synthetic task with random weights. It ends as

- ``.`` done: the bundle is verified, and MACs (prune) or unique bytes (share) really fell, or it has exits; where a
  note says that `prune_residual` alone reaches the target, the cell does as it is told and runs once more;
- ``o`` nothing to do, and said so, for one of the reasons of `REASONS` that is true of the network;
- ``r`` refused in words, for one of these reasons;
- ``X`` anything else: a crash, a refusal without such a reason, a claim that is not true, no end after four minutes.

Figures: `cells`, `done` (share), `wrong` (number of ``X``). Cells that are finished are read from ``--work`` and not
run again, unless ``--again`` names their letters.

    python benchmarks/breadth.py --work DIR                 # all
    python benchmarks/breadth.py --work DIR --only hf: lstm # architectures with one of these in their name
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "breadth")]
from figures import Figure, arguments, report  # noqa: E402

LIMIT_S = 240.0
_SERVER = multiprocessing.get_context("forkserver")
_SHORT = {"epochs": 0}
_PRUNE = {
    "name": "class_aware_pruning",
    "target_steps": 1,
    "max_drop": 1.0,
    "images_per_class": 4,
    "retrain": _SHORT,
}
_SHARE = {"name": "basis_sharing", "ratio": 0.3, "calibration_samples": 16, "calibration_batch": 16}
_EXITS = {
    "name": "early_exit",
    "at_macs": [0.33, 0.66],
    "head_epochs": 1,
    "freeze_backbone": True,
    "tolerance": 1.0,
}
CELLS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "export": (),
    "prune": (_PRUNE,),
    "share": (_SHARE,),
    "exits": (_EXITS,),
    "chain": (_PRUNE, _SHARE, _EXITS),
}
_NEEDS_CLASSES = "early_exit"
_STREAMS = "set `prune_residual: true`, which alone reaches it"


@dataclass(frozen=True)
class Cell:
    """How one cell ended."""

    architecture: str
    what: str
    verdict: str
    why: str
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    """Why nothing, or no bundle, can come of a cell.

    Attributes:
        words: found in what the product said.
        holds: whether it is true of the architecture called so.
    """

    words: str
    holds: Callable[[str], bool]


def _wide(least: int) -> Callable[[str], bool]:
    """Whether no layer has as many outputs; read off the module itself."""

    def holds(name: str) -> bool:
        from architectures import model
        from torch import nn

        layers = [m for m in model(name).modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        return all(layer.weight.shape[0] < least or layer.weight.shape[1] < least for layer in layers)

    return holds


def _no_classes(name: str) -> bool:
    from architectures import TABLE

    return TABLE[name].kind != "classes" or TABLE[name].answers is not None


def _data_dependent(name: str) -> bool:
    """Whether PyTorch itself cannot make one graph of it, and says that values decide."""
    import torch
    from architectures import TABLE, drawn, model

    inputs = tuple(drawn(spec, 2, torch.Generator().manual_seed(0)) for spec in TABLE[name].inputs)
    try:
        torch.export.export(model(name), inputs, strict=False)
    except Exception as error:
        return re.search(r"data.dependent|Could not guard|unbacked", str(error), re.IGNORECASE) is not None
    return False


def _scripted(name: str) -> bool:
    import torch
    from architectures import model

    return any(isinstance(m, torch.jit.ScriptModule) for m in model(name).modules())


REASONS: Mapping[str, Reason] = {
    "no wide layer": Reason(r"nothing (can|could) be (pruned|removed|shared)|no layer|would not save", _wide(17)),
    "kind not served": Reason(r"serves models that return one tensor|no classes|needs classes", _no_classes),
    "data-dependent shapes": Reason(r"values of a tensor|data.dependent|depends? on (data|values)", _data_dependent),
    "scripted code": Reason(r"[Ss]cript", _scripted),
}
"""The fixed list."""


def _recipe(name: str, what: str, streams: bool) -> dict[str, Any]:
    from architectures import TABLE

    stages = [dict(stage) for stage in CELLS[what]]
    if streams:
        stages = [stage | ({"prune_residual": True} if stage["name"] == _PRUNE["name"] else {}) for stage in stages]
    if what == "chain" and _no_classes(name):
        stages = [stage for stage in stages if stage["name"] != _NEEDS_CLASSES]
    named, args = TABLE[name].named or ("python:architectures.py:model", {"name": name})
    return {
        "model": {"name": named, "args": dict(args)},
        "task": {"name": "python:data.py:task", "args": {"name": name}},
        "stages": stages,
        "threads": 1,
        "benchmark": {"enabled": False},
    }


def run_cell(name: str, what: str, streams: bool = False) -> Cell:
    """Runs one cell here; once more with `prune_residual` where the product says that this alone reaches the target."""
    from edgewright import edge_runtime
    from edgewright.edge_runtime.errors import EdgewrightError
    from edgewright.pipeline import run
    from edgewright.pipeline.recipe.recipe import parse_recipe

    began = time.monotonic()
    said, figures = "", dict[str, float]()

    def end(verdict: str, why: str) -> Cell:
        return Cell(name, what, verdict, " ".join(why.split())[:400], time.monotonic() - began, figures)

    with tempfile.TemporaryDirectory(prefix="breadth-") as folder:
        try:
            result = run(parse_recipe(_recipe(name, what, streams), HERE / "breadth"), Path(folder, "out"))
            assert result.bundle is not None
            verified = edge_runtime.verify(result.bundle)
        except EdgewrightError as error:
            said = str(error)
            reason = _reason(said, name)
            return end("r" if reason else "X", f"{reason}: {said}" if reason else f"{type(error).__name__}: {said}")
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            return end("X", f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})")
        if not verified.passed:
            return end("X", f"the bundle does not verify: {verified.text()}")
        first, last = result.steps[0], result.steps[-1]
        figures |= {
            "macs": last.macs / max(1.0, first.macs),
            "bytes": last.unique_weight_bytes / max(1, first.unique_weight_bytes),
        }
        notes = " ".join(note for step in result.steps for note in step.notes)
        with edge_runtime.open_bundle(result.bundle) as bundle:
            exits = len(bundle.manifest.exits) - 1
        missing = {
            "export": [],
            "prune": [] if figures["macs"] < 0.95 else ["MACs did not fall"],
            "share": [] if figures["bytes"] < 0.95 else ["unique bytes did not fall"],
            "exits": [] if exits else ["no exit"],
            "chain": [] if min(figures.values()) < 0.95 else ["neither MACs nor bytes fell"],
        }[what]
        if not missing:
            return end(".", ", ".join(f"{key} {value:.2f}" for key, value in figures.items()))
        if _STREAMS in notes and not streams:
            again = run_cell(name, what, streams=True)
            return dataclasses.replace(again, why=f"with prune_residual, as the note says: {again.why}"[:400])
        reason = _reason(notes, name)
        return end("o" if reason else "X", f"{missing[0]}; {reason or 'no reason'}: {notes}")


def _reason(text: str, name: str) -> str | None:
    """The reason of the list that the words give and that is true."""
    for reason, known in REASONS.items():
        if re.search(known.words, text) and known.holds(name):
            return reason
    return None


def _apart(name: str, what: str, place: Path) -> Cell:
    """Runs a cell in a process of its own, forked from a server that has imported everything."""
    began = time.monotonic()
    said = place.with_suffix(".said")
    process = _SERVER.Process(target=_alone, args=(name, what, place, said))
    process.start()
    process.join(LIMIT_S)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError, TypeError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() if said.is_file() else []
    said.unlink(missing_ok=True)
    if place.is_file():
        return Cell(**json.loads(place.read_text(encoding="utf-8")))
    last = (lines or ["nothing on stderr"])[-1][:300]
    why = f"not finished after {LIMIT_S:.0f} s" if code is None else f"ended with {code}: {last}"
    cell = Cell(name, what, "X", why, time.monotonic() - began)
    _write(cell, place)
    return cell


def _alone(name: str, what: str, place: Path, said: Path) -> None:
    """The process of a cell; leads a group of its own, so that nothing of it outlives its time."""
    os.setsid()
    with said.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _write(run_cell(name, what), place)


def _write(cell: Cell, place: Path) -> None:
    aside = place.with_suffix(".part")
    aside.write_text(json.dumps(asdict(cell), indent=1), encoding="utf-8")
    aside.replace(place)


def main() -> int:
    """Runs what is missing and prints the table."""
    from architectures import QUICK, TABLE

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="architectures with PART in them")
        parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), help="columns")
        parser.add_argument("--work", type=Path, default=Path("build/breadth"), help="finished cells, kept")
        parser.add_argument("--again", default="", metavar="LETTERS", help="run cells anew that ended so, e.g. X")
        parser.add_argument("--workers", type=int, default=2, help="cells side by side")

    options = arguments(__doc__ or "", more)
    names = [n for n in (QUICK if options.quick else TABLE) if any(part in n for part in options.only)]
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE / "breadth")])
    _SERVER.set_forkserver_preload(["warm"])

    def cell(name: str, what: str) -> Cell:
        place = options.work / f"{re.sub(r'[^a-z0-9_]', '-', name)}.{what}.json"
        if place.is_file():
            known = Cell(**json.loads(place.read_text(encoding="utf-8")))
            if known.verdict not in options.again:
                return known
            place.unlink()
        return _apart(name, what, place)

    found: list[Cell] = []
    with ThreadPoolExecutor(options.workers) as pool:
        rows = {name: [pool.submit(cell, name, what) for what in options.cells] for name in names}
        print(f"{'':<44} {' '.join(options.cells)}")
        for name, waiting in rows.items():
            cells = [future.result() for future in waiting]
            found += cells
            marks = " ".join(f"{c.verdict:<{len(c.what)}}" for c in cells)
            print(f"{name:<44} {marks} {sum(c.seconds for c in cells):5.0f} s", flush=True)
    for one in found:
        if one.verdict != ".":
            print(f"{one.verdict} {one.architecture} {one.what}: {one.why}")
    wrong, done = (sum(one.verdict == mark for one in found) for mark in "X.")
    values = {"cells": float(len(found)), "done": done / max(1, len(found)), "wrong": float(wrong)}
    report("breadth", {name: Figure(value, value, value) for name, value in values.items()}, options.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
