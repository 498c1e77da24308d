"""A stranger's networks that are no classifiers, from a few lines of their code to `predict` on the device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.edge_runtime import ClassMap, Values, load, open_bundle, verify
from edgewright.edge_runtime.cli import main
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.recipe.recipe import load_recipe
from edgewright.pipeline.runs.preparation import prepare
from edgewright.pipeline.runs.runner import run

REGRESSION = """
import torch
from torch import nn
from edgewright.pipeline import Regression


class Sensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        features = self.body(x)
        return {"features": features, "forces": self.head(features)} if WRAPPED else self.head(features)


def task():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0] * 20 + 300, x[:, 1] * 2 - x[:, 2], x[:, 3].abs() * 1000], dim=1)
    made = Regression.from_arrays(x, y, columns=("fx", "fy", "fz"), unit="N", standardise=True, metric="r2")
    return made if not WRAPPED else At(made, "forces")


class At:
    def __init__(self, task, leaf):
        self._task, self._leaf = task, leaf

    def __getattr__(self, name):
        return getattr(self._task, name)

    @property
    def answers(self):
        import dataclasses
        return [dataclasses.replace(spec, leaf=self._leaf) for spec in self._task.answers]
"""

SEGMENTATION = """
import torch
from torch import nn
from edgewright.pipeline import Segmentation


def model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1),
    )


def task():
    x = torch.randn(200, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    return Segmentation.from_arrays(x, (nn.functional.avg_pool2d(x, 3, 1, 1)[:, 0] > 0).long(), ["low", "high"])
"""


def _recipe(folder: Path, source: str, model: str, stages: str) -> Path:
    (folder / "mine.py").write_text(source)
    text = f"""model: "python:mine.py:{model}"
task: "python:mine.py:task"
stages: {stages}
benchmark: {{enabled: false}}
"""
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


SHORT = "{name: train, epochs: 8, learning_rate: 0.02}"
PRUNE = (
    "{name: class_aware_pruning, criterion: %s, target_mac_reduction: 0.3, max_drop: 1.0, "
    "retrain: {epochs: 1}, finetune: {epochs: 2}}"
)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "mapping"])
def test_a_regression_goes_from_training_to_its_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrapped: bool
) -> None:
    source = f"WRAPPED = {wrapped}\n{REGRESSION}"
    stages = f"[{SHORT}, {PRUNE % 'l1'}, basis_sharing]"
    result = run(_recipe(tmp_path, source, "Sensor", stages), tmp_path / "out")
    final = result.steps[-1]
    assert final.metric == "r2" and final.accuracy is None and final.macs < result.steps[0].macs
    page = (tmp_path / "out" / "report.html").read_text()
    assert "accuracy" not in page and "r2" in page
    assert verify(result.bundle).passed
    with open_bundle(result.bundle) as bundle:
        assert [spec.kind for spec in bundle.manifest.answers] == ["values"]
        assert [spec.name for spec in bundle.manifest.outputs] == ["values"]
    x = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    with load(result.bundle) as runner:
        found = runner.predict(x)
    assert isinstance(found, Values) and found.unit == "N" and found.labels == ("fx", "fy", "fz")
    error = np.abs(found.values[:, 0] - (x[:, 0] * 20 + 300))
    assert error.mean() < 10.0, "in newtons around 300, not in deviations around 0"
    np.save(tmp_path / "x.npy", x[:2])
    capsys.readouterr()
    assert main(["predict", str(result.bundle), str(tmp_path / "x.npy"), "--json", str(tmp_path / "p.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row 0: fx ") and lines[0].endswith(" N")
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["unit"] == "N" and np.shape(told["values"]) == (2, 3)
    assert main(["predict", str(result.bundle), str(tmp_path / "x.npy"), "--save", str(tmp_path / "m.png")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["taylor", "class_count"])
def test_a_segmentation_goes_from_training_to_a_drawn_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], criterion: str
) -> None:
    images = pytest.importorskip("PIL.Image")
    stages = f"[{SHORT}, {PRUNE % criterion}, basis_sharing]"
    result = run(_recipe(tmp_path, SEGMENTATION, "model", stages), tmp_path / "out")
    final = result.steps[-1]
    assert final.metric == "mean_iou" and final.accuracy is None and final.quality > 0.6
    assert final.macs < result.steps[0].macs
    assert "accuracy" not in (tmp_path / "out" / "report.html").read_text()
    report = verify(result.bundle)
    assert report.passed and report.label_agreement is not None and report.label_agreement > 0.999
    x = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    want = torch.nn.functional.avg_pool2d(x, 3, 1, 1)[:, 0] > 0
    with load(result.bundle) as runner:
        found = runner.predict(x.numpy())
    assert isinstance(found, ClassMap) and found.label.shape == (3, 12, 12) and found.labels == ("low", "high")
    assert (found.label == want.numpy()).mean() > 0.8
    np.save(tmp_path / "x.npy", x.numpy())
    capsys.readouterr()
    assert main(["predict", str(result.bundle), str(tmp_path / "x.npy"), "--save", str(tmp_path / "m.png")]) == 0
    assert "high" in capsys.readouterr().out.splitlines()[0]
    assert (np.asarray(images.open(tmp_path / "m.png")) == found.label.reshape(36, 12)).all()


@pytest.mark.parametrize(("source", "model"), [("WRAPPED = False\n" + REGRESSION, "Sensor"), (SEGMENTATION, "model")])
def test_exits_are_refused_before_any_compute(tmp_path: Path, source: str, model: str) -> None:
    recipe = load_recipe(_recipe(tmp_path, source, model, "[train, early_exit]"))
    with pytest.raises(DataError, match=r"'early_exit' serves .* classes, and the task .* answers (values|class_map)"):
        prepare(recipe)
