"""A run that is killed in the middle of every phase ends with the bytes of a run that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
model: "python:tiny.py:tiny_residual"
task: "python:tiny.py:tiny_task"
root: {tests}
stages:
  - {{name: train, epochs: 6, batch_size: 16}}
  - {{name: class_aware_pruning, criterion: l1, target_mac_reduction: 0.4, max_drop: 0.5, max_frac_per_iter: 0.2,
      retrain: {{epochs: 2, batch_size: 16}}}}
  - {{name: basis_sharing, ratio: 0.3, finetune: {{epochs: 4, batch_size: 16}}}}
  - {{name: early_exit, at: [blocks.0, blocks.1], head_epochs: 5, training: {{epochs: 4, batch_size: 16}}}}
benchmark: {{enabled: false}}
"""
PHASES = ("train: starts", "class_aware_pruning: starts", "basis_sharing: starts", "early_exit: starts", "export to")


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "edgewright_launch", "run", str(recipe), "--out", str(out)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def run_until(recipe: Path, out: Path, line: str | None) -> tuple[list[str], int]:
    """Runs until a progress line holds `line`, then a moment longer, then kills the whole process group."""
    process = start(recipe, out)
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)
        if line is not None and line in text:
            time.sleep(0.4)
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    return seen, process.wait()


def content(out: Path) -> dict[str, bytes]:
    """What must be equal: checkpoints, model, golden cases, manifest."""
    found = {}
    for path in [*(out / "checkpoints").rglob("*"), *(out / "bundle").rglob("*")]:
        if path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


@pytest.mark.slow
def test_killed_in_every_phase_and_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(tests=Path(__file__).parent))
    seen, code = run_until(recipe, tmp_path / "whole", None)
    assert code == 0, "".join(seen)
    for phase in PHASES:
        _, code = run_until(recipe, tmp_path / "killed", phase)
        assert code == -signal.SIGKILL, phase
    seen, code = run_until(recipe, tmp_path / "killed", None)
    assert code == 0, "".join(seen)
    assert "".join(seen).count("already done") == 5, "finished work was done again"
    whole, killed = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []
    for name in ("bundle/model.onnx", "bundle/golden.npz", "bundle/manifest.json"):
        assert name in whole
    left = {run: sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("whole", "killed")}
    assert left["whole"] == left["killed"], "something is left over"
