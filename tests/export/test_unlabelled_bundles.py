"""Bundles of tasks without classes: numbers are proven and answered, no label is claimed of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unlabelled import Embedding, Regression, network

from edgewright.edge_runtime import Values, load, verify
from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.errors import ExportError
from edgewright.edge_runtime.inference.session import session_on
from edgewright.export.bundle import export_bundle
from edgewright.export.proof.agreement import Agreement
from edgewright.export.proof.subject import Reference
from edgewright.export.source import answers_of


class Column(nn.Module):
    """One number a row, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network(1)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = 30 + self.model(x)[:, 0]
        return values


class Sequence(nn.Module):
    """[N, 3, 4] of inputs [N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network(12)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.model(x).view(-1, 3, 4)
        return values


@pytest.mark.slow
@pytest.mark.parametrize("build", [Column, lambda: network(3), Sequence], ids=["column", "vectors", "sequence"])
def test_outputs_come_back_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], build) -> None:
    task, model = Embedding(3), build().eval()
    bundle = tmp_path / "bundle"
    parity = export_bundle(model, task, bundle).manifest.parity
    assert parity.label_agreement is None and parity.rows == 48 and parity.max_abs_diff < 1e-4
    report = verify(bundle)
    assert report.passed and report.label_agreement is None and "label" not in report.text()
    x = task.splits["test"].inputs[:3].numpy()
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    for runner in (load(bundle), session_on(bundle / "model.onnx")):
        with runner:
            found = runner.predict(x)
            again, one = runner.predict(x), runner.predict(x[1])
        for got, values in ((found, want), (again, want), (one, want[1:2])):
            np.testing.assert_allclose(got.values, values, rtol=1e-5, atol=1e-6)
            assert isinstance(got, Values) and got.unit == "" and got.labels == ()
    x[1, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    capsys.readouterr()
    assert main(["predict", str(bundle), str(tmp_path / "x.npy"), "--json", str(tmp_path / "p.json")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[2]) == pytest.approx(want.reshape(3, -1)[0, 0], rel=1e-4)
    assert lines[0].startswith("row 0: ") and lines[1].startswith("row 1: refused: ")
    assert not any(word in line for line in lines for word in ("score", "label", "exit", "logits"))
    told = json.loads((tmp_path / "p.json").read_text())
    assert set(told) == {"schema_version", "values", "unit", "labels", "refused"} and list(told["refused"]) == ["1"]
    np.testing.assert_allclose(told["values"][2], want[2], rtol=1e-5, atol=1e-6)
    assert set(np.ravel(told["values"][1])) == {None}


def test_numbers_without_classes_still_fail_parity() -> None:
    model = network(2)
    reference = Reference(model, answers_of(Regression()))
    logits = reference.logits([torch.zeros(2, 8)])
    want, margin = reference.answer(logits, None, [1e-6])
    got = {"logits": want["logits"][:, ::-1].copy()}  # another label in every row, which is none here
    check = Agreement(1e-4, 1e-4, reference.specs)
    check.answers("", "test", [0, 1], got, want, margin, 1e-6)
    assert check.label_flips == 0 and check.rows == 2 and "logits" in check.failures[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told_what_to_export(tmp_path: Path, dtype: torch.dtype) -> None:
    class Cast(Column):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(dtype)

    for model, words in ((network().to(dtype), r"export `model\.float\(\)`"), (Cast(), r"return `\.float\(\)`")):
        with pytest.raises(ExportError, match=words):
            export_bundle(model, Regression(), tmp_path / "bundle")
