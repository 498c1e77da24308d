"""What schema 1 wrote stays readable: a bundle, a checkpoint and a report of 0.1.0, kept as they were written.

``golden/schema_1.tar.xz`` is the result of ``train`` and ``early_exit`` on ``tiny.py``, which lies beside it in there.
Never write it anew for a change of ours: a change that cannot read it needs another schema version.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.edge_runtime import open_bundle, verify
from edgewright.edge_runtime.bundle.bundle import file_sha256
from edgewright.edge_runtime.bundle.manifest import MANIFEST_FILE
from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.pipeline.recipe.recipe import Requirements
from edgewright.pipeline.runs.requirements import check_requirements
from edgewright.pipeline.stages.early_exit.mix import mix_of_report, read_report
from edgewright.pipeline.store.checkpoint import CHECKPOINT_FILE, load_checkpoint, read_checkpoint

ARCHIVE = Path(__file__).parent / "golden" / "schema_1.tar.xz"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_the_bundle_verifies_and_answers(golden: Path) -> None:
    report = verify(golden / "bundle")
    assert report.passed and report.schema_version == 1
    with open_bundle(golden / "bundle") as bundle:
        assert bundle.manifest.labels == ("a", "b", "c")
        assert [each.name for each in bundle.manifest.exits] == ["2", "final"]


def test_the_checkpoint_loads_and_answers_as_the_bundle_recorded(golden: Path) -> None:
    (folder,) = (golden / "run" / "checkpoints").iterdir()
    assert [edit.stage for edit in read_checkpoint(folder).edits] == ["train", "early_exit"]
    model = load_checkpoint(folder, golden)
    assert isinstance(model, MultiExit)
    with open_bundle(golden / "bundle") as bundle:
        for case in bundle.golden():
            if case.thresholds is not None:
                model.thresholds.copy_(torch.as_tensor(case.thresholds))
            with torch.no_grad():
                answer = model(*(torch.from_numpy(value) for value in case.inputs.values()))
            assert answer.label.tolist() == case.torch["label"].tolist()
            assert answer.exit_index.tolist() == case.torch["exit_index"].tolist()
            torch.testing.assert_close(answer.scores, torch.from_numpy(case.torch["scores"]), atol=1e-5, rtol=1e-4)


def test_the_report_is_read(golden: Path) -> None:
    report = read_report(golden / "run")
    assert mix_of_report(report, None, None).expected_macs == pytest.approx(report["steps"][-1]["macs"], rel=1e-6)
    check_requirements(report, Requirements(max_accuracy_drop=0.5))


def _bundle(golden: Path) -> None:
    place = golden / "bundle" / MANIFEST_FILE
    _set_version(place)
    seal = place.with_suffix(".sha256")
    seal.write_text(seal.read_text().replace(seal.read_text().split()[0], file_sha256(place)))
    open_bundle(golden / "bundle")


def _checkpoint(golden: Path) -> None:
    (folder,) = (golden / "run" / "checkpoints").iterdir()
    _set_version(folder / CHECKPOINT_FILE)
    load_checkpoint(folder, golden)


def _report(golden: Path) -> None:
    _set_version(golden / "run" / "report.json")
    read_report(golden / "run")


def _set_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))


@pytest.mark.parametrize("reader", [_bundle, _checkpoint, _report])
def test_another_schema_is_refused_by_its_number(golden: Path, reader: Any) -> None:
    with pytest.raises(EdgewrightError, match=r"schema_version 99.*reads 1") as caught:
        reader(golden)
    assert caught.value.exit_code == 2
