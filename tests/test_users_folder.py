"""The whole way for a stranger: their module, weights, data and recipe in a folder of their own, far from ours.

Their folder has packages called `models` and `export`, as many repositories do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import CLASSES, TinyResidual, tiny_task

SOURCES = {
    "models/__init__.py": "",
    "models/net.py": """
import torch
from torch import nn

from export.blocks import Mix


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.mix = nn.Sequential(Mix(width), Mix(width), Mix(width))
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.mix(self.stem(x)).mean((2, 3)))


def build(width=12):
    return Net(width)
""",
    "export/__init__.py": "",
    "export/blocks.py": """
import torch
from torch import nn


class Mix(nn.Module):
    '''A residual block with a grouped convolution of its own.'''

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Conv2d(width, 2 * width, 3, 1, 1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=4)
        self.out = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = torch.relu(self.norm(self.inner(x)))
        return x + self.out(torch.relu(self.grouped(y)))
""",
    "data.py": """
from pathlib import Path

import numpy as np

from edgewright.pipeline import ImageClassification


def corners():
    arrays = np.load(Path(__file__).with_name("corners.npz"))
    parts = ("train", "calibration", "validation", "test")
    return ImageClassification({p: (arrays[p + "_x"], arrays[p + "_y"]) for p in parts}, ["nw", "ne", "sw", "se"])
""",
    "recipe.yaml": """
model: {name: "python:models.net:build", args: {width: 12}, weights: net.safetensors}
task: "python:data.py:corners"
stages:
  - {name: train, epochs: 3, batch_size: 32}
  - {name: class_aware_pruning, criterion: l1, target_mac_reduction: 0.3, max_drop: 0.3, retrain: {epochs: 1}}
  - {name: basis_sharing, group_size: 3, share: always, layers: {include: ["mix.*.inner"]}, ratio: 0.3}
  - {name: early_exit, at: [mix.0, mix.1], head_epochs: 3, training: {epochs: 1}}
benchmark: {seconds: 0.2}
""",
}


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgewright_launch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stranger")
    for name, text in SOURCES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    arrays = {}
    for name, split in tiny_task(rows={"train": 192, "calibration": 48, "validation": 96, "test": 64}).splits.items():
        batch = split.batch(range(len(split)))
        arrays[f"{name}_x"], arrays[f"{name}_y"] = batch.inputs[0].numpy(), batch.targets.numpy()
    np.savez(root / "corners.npz", **arrays)
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.manual_seed(0); from models.net import build; from safetensors.torch import save_file;"
            "save_file(build().state_dict(), 'net.safetensors')",
        ],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    done = command("run", "recipe.yaml", "--out", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.slow
def test_the_whole_way(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["schema_version"] == 2
    steps = {s["step"]: s for s in report["steps"]}
    assert list(steps) == ["base", "train", "class_aware_pruning", "basis_sharing", "early_exit"]
    fields = {"accuracy", "worst_class_accuracy", "macs", "parameters", "unique_weight_bytes", "file_bytes"}
    for step in steps.values():
        assert fields <= set(step)
        assert 0 < step["p50_ms"] <= step["p90_ms"] or step["p90_ms"] is None
    assert steps["class_aware_pruning"]["macs"] < 0.75 * steps["train"]["macs"]
    filters = steps["class_aware_pruning"]["metrics"]["iterations"][-1]["filters"]
    assert filters["mix.0.grouped"] == filters["mix.0.inner"] in (6, 12, 18), "whole groups of the grouped convolution"
    parity = report["parity"]
    assert parity["max_abs_diff"] <= 1e-4
    assert (parity["label_agreement"], parity["exit_agreement"]) == (1.0, 1.0)
    assert (parity["exits_covered"], parity["exits_total"]) == (3, 3)
    ((_, users),) = report["ledger"]["shared"].items()
    assert users == ["base.mix.0.inner", "base.mix.1.inner", "base.mix.2.inner"]
    assert {m["step"] for m in report["measurements"]} == set(steps)


@pytest.mark.slow
def test_the_page_opens_offline(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.slow
def test_verify_and_predict_by_the_commands(finished: Path, folder: Path) -> None:
    verified = command("verify", "out/bundle", folder=folder)
    assert verified.returncode == 0, verified.stderr
    np.save(folder / "one.npy", np.load(folder / "corners.npz")["test_x"][:3])
    predicted = command("predict", "out/bundle", "one.npy", folder=folder)
    assert predicted.returncode == 0, predicted.stderr
    assert len(re.findall(r"\b(nw|ne|sw|se)\b", predicted.stdout)) == 3


@pytest.mark.slow
def test_a_second_run_does_nothing_again(finished: Path, folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*") if p.is_file()}
    before[finished / "bundle" / "model.onnx"] = (finished / "bundle" / "model.onnx").stat().st_mtime_ns
    again = command("run", "recipe.yaml", "--out", "out", "--set", "benchmark.enabled=false", folder=folder)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_before_anything_is_computed(folder: Path) -> None:
    other = TinyResidual(classes=CLASSES).state_dict()
    save_file({k: v.clone() for k, v in other.items() if torch.is_floating_point(v)}, folder / "other.safetensors")
    done = command("run", "recipe.yaml", "--out", "never", "--set", "model.weights=other.safetensors", folder=folder)
    assert done.returncode == 2
    assert "other.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "never" / "checkpoints").exists()
