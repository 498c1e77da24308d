"""A small run outside the repository, for the tests of `run` and of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from edgewright.pipeline.report.steps import StepRow
from edgewright.pipeline.runs import runner
from edgewright.pipeline.runs.exporting import ExportPlan

MODEL = """
import torch
from torch import nn

def net(width=6, classes=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))
"""

TASK = """
import torch
from edgewright.pipeline.tasks.image_classification import ImageClassification

def task(rows=96, labels=3, splits=("train", "validation", "test"), bad=False, empty=False, twice=False):
    generator = torch.Generator().manual_seed(0)
    data = {}
    for name in splits:
        y = torch.arange(rows) % labels
        x = torch.randn(rows, 5, generator=generator)
        x[torch.arange(rows), y] += 4.0
        if bad:
            x[7, 2] = float("nan")
        if empty and name == "train":
            x, y = x[y != 1], y[y != 1]
        data[name] = (x, y)
    if twice:
        data["test"] = data["train"]
    return ImageClassification(data, [f"label{i}" for i in range(labels)], name="small")
"""


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A model, a task and a recipe that trains twice; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODEL)
    (folder / "data.py").write_text(TASK)
    short = {"name": "train", "epochs": 3, "batch_size": 16}
    recipe = {
        "model": "python:net.py:net",
        "task": "python:data.py:task",
        "stages": [short, {**short, "id": "tune", "learning_rate": 0.01}],
        "benchmark": {"enabled": False},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _nothing_exported(plan: ExportPlan, steps: Sequence[StepRow], *_: object) -> dict[str, SimpleNamespace]:
    return {steps[-1].step: SimpleNamespace(path=plan.out / "bundle", manifest=None)}


def without_later_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out export, measurement and report: seconds each, and tested where they are made."""
    monkeypatch.setattr(runner, "export_bundles", _nothing_exported)
    monkeypatch.setattr(runner, "measure_bundles", lambda *_: [])
    monkeypatch.setattr(runner, "compare_bundles", lambda *_: None)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)
    monkeypatch.setattr(runner.bundles, "with_bundle", lambda row, made: row)
