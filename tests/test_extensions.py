"""A package beside the project brings a stage, a task and a model; what of it is broken says so when it is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = {
    "acme/__init__.py": "",
    "acme/scaling.py": """
from pydantic import Field
from edgewright.pipeline.section import Section, Table, Text
from edgewright.pipeline.stage import Edit, Requirement, Stage, StageConfig, StageResult
from . import numbers

class ScalingConfig(StageConfig):
    factor: float = Field(default=2.0, gt=0)
    \"\"\"What the logits are multiplied by.\"\"\"

def fit(model, task, config, context):
    model[-1].weight.data.mul_(config.factor * numbers.ONE)
    notes = ("MACs and parameters stay: values change, not structure",)
    return StageResult(model, Edit("acme_scaling"), {"factor": config.factor}, notes=notes)

def report(finished):
    rows = (("factor", str(finished.metrics["factor"])),)
    return Section("Scaling", (Text("what `acme` did"), Table(("what", "value"), rows)), {"done": True})

def missed(report):
    return ["the logits are too large"]

STAGE = Stage("acme_scaling", ScalingConfig, fit, lambda model, edit: model, splits=("train",), report=report,
              requirements={"small_logits": Requirement("Logits are small.", missed)})
""",
    "acme/numbers.py": "ONE = 1.0\n",
    "acme/data.py": """
import torch
from edgewright.pipeline import ImageClassification

def noise(rows: int = 120):
    y = torch.arange(rows) % 3
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)) + y[:, None]
    return ImageClassification.from_arrays(x, y, ["a", "b", "c"], name="noise")
""",
    "acme/nets.py": """
from torch import nn

def build(name, width=8):
    return {"plain": nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))}[name]
""",
    "acme/broken.py": "import a_package_that_is_not_there\n",
    "acme-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.5\n",
    "acme-1.5.dist-info/entry_points.txt": """
[edgewright.stages]
acme_scaling = acme.scaling:STAGE
acme_broken = acme.broken:STAGE
[edgewright.tasks]
acme_noise = acme.data:noise
[edgewright.models]
acme = acme.nets:build
""",
}
RECIPE = """
model: {name: "acme:plain", args: {width: 6}}
task: acme_noise
stages: [{name: acme_scaling, factor: 3}]
benchmark: {enabled: false}
threads: 1
"""


def edgewright(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "site"), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, "-m", "edgewright_launch", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    for name, text in PACKAGE.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_a_stage_a_task_and_a_model_of_another_package_run(beside: Path) -> None:
    done = edgewright(beside, "run", "r.yaml", "--out", "o")
    assert done.returncode == 0, done.stderr
    report = json.loads((beside / "o/report.json").read_text())
    (section,) = report["sections"]
    assert (section["stage"], section["data"]) == ("acme_scaling", {"done": True})
    page = (beside / "o/report.html").read_text()
    assert "<h2>Scaling</h2>" in page and "what <code>acme</code> did" in page
    edit = json.loads((beside / "o/bundle/manifest.json").read_text())["edits"][0]
    assert edit["stage"] == "acme_scaling"

    again = edgewright(beside, "run", "r.yaml", "--out", "o")
    assert "acme_scaling: already done" in again.stderr
    (beside / "site/acme/numbers.py").write_text("ONE = 1.5\n")
    changed = edgewright(beside, "run", "r.yaml", "--out", "o", "--set", "require.small_logits=true")
    assert "sources.acme.numbers changed" in changed.stderr, "its sources are part of the key"
    assert changed.returncode == 4 and "the logits are too large" in " ".join(changed.stderr.split())


@pytest.mark.slow
def test_the_schema_knows_them_and_what_is_broken_says_so(beside: Path) -> None:
    schema = json.loads(edgewright(beside, "schema").stdout)
    assert schema["$defs"]["stage acme_scaling"]["properties"]["factor"]["exclusiveMinimum"] == 0
    assert "stage acme_broken" not in schema["$defs"]
    assert schema["$defs"]["Requirements"]["properties"]["small_logits"]["type"] == "boolean"
    for stages, message in (
        ("[acme_broken]", "'acme_broken' (acme.broken:STAGE of acme 1.5) cannot be imported: ModuleNotFoundError"),
        ("[acme_scalling]", "did you mean 'acme_scaling'?"),
    ):
        done = edgewright(beside, "run", "r.yaml", "--set", f"stages={stages}")
        assert done.returncode == 2 and message in " ".join(done.stderr.split())
