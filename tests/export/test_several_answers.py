"""A model that returns a tuple or a mapping: named outputs of several kinds, proven and answered each in its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unlabelled import Regression

from edgewright.edge_runtime import AnswerSpec, ClassMap, Prediction, Values, load, session_on, verify
from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.errors import ExportError
from edgewright.export import export_bundle
from edgewright.export.source import answers_of


class Three(nn.Module):
    """A class, a distance and a map of each row [N, 8]; and features that nobody asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body, self.kind = nn.Linear(8, 16), nn.Linear(16, 3)
        self.distance, self.map = nn.Linear(16, 1), nn.Linear(16, 2 * 4 * 5)

    def forward(self, x: Tensor) -> object:
        y = torch.relu(self.body(x))
        found = (y, self.kind(y), self.distance(y), self.map(y).view(-1, 2, 4, 5))
        return found if self.form == "tuple" else dict(zip(("features", "kind", "far", "map"), found, strict=True))


class Task(Regression):
    """Says where the answers lie."""

    def __init__(self, leaves: Sequence[int | str]) -> None:
        super().__init__()
        self.leaves = leaves

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        kind, far, drawn = self.leaves
        return (
            AnswerSpec("map", "class_map", ("in", "out"), leaf=drawn),
            AnswerSpec("kind", "classes", ("a", "b", "c"), leaf=kind),
            AnswerSpec("distance", "values", unit="m", scale=(10.0,), offset=(5.0,), leaf=far),
        )


@pytest.mark.slow
@pytest.mark.parametrize(("form", "leaves"), [("tuple", (1, 2, 3)), ("mapping", ("kind", "far", "map"))])
def test_named_outputs_of_several_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, leaves: Sequence[int | str]
) -> None:
    task, model = Task(leaves), Three(form).eval()
    made = export_bundle(model, task, tmp_path / "bundle")
    assert [spec.name for spec in made.manifest.outputs] == ["map", "kind", "distance"]
    assert made.manifest.answers == task.answers and made.manifest.labels == ("in", "out")
    assert made.manifest.parity.label_agreement == 1.0 and len(made.label) == 48
    report = verify(made.path)
    assert report.passed and report.label_agreement == 1.0, report.text()
    x = task.splits["test"].inputs[:3]
    with torch.no_grad():
        _, kind, far, drawn = Three("tuple").eval()(x)
    for runner in (load(made.path), session_on(made.path / "model.onnx")):
        with runner:
            found = runner.predict(x.numpy())
        assert list(found) == ["map", "kind", "distance"]
        assert isinstance(found["map"], ClassMap) and (found["map"].label == drawn.argmax(1).numpy()).all()
        assert isinstance(found["kind"], Prediction) and (found["kind"].label == kind.argmax(1).numpy()).all()
        assert isinstance(found["distance"], Values) and found["distance"].unit == "m"
        np.testing.assert_allclose(found["distance"].values, far.numpy() * 10 + 5, rtol=1e-4)
    np.save(tmp_path / "x.npy", x.numpy())
    capsys.readouterr()
    assert main(["predict", str(made.path), str(tmp_path / "x.npy")]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[:3]] == ["map", "kind", "distance"]


def test_a_leaf_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'distance' \(values\) is a tensor at 7, and the model returns a tuple"):
        export_bundle(Three("tuple").eval(), Task((1, 7, 3)), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "none"),
        ([AnswerSpec("y", "sounds")], "kind 'sounds', and this runtime knows"),
        ([AnswerSpec("y", "exits")], "early exits make of 'classes'"),
        ([AnswerSpec("x", "values")], "name 'x' is taken"),
        ([AnswerSpec("y", "values", leaf=0), AnswerSpec("y", "values", leaf=1)], "one name twice"),
        ([AnswerSpec("y", "values", leaf=0), AnswerSpec("z", "values", leaf=0)], "one leaf twice"),
        ([AnswerSpec("y", "values", leaf=0), AnswerSpec("z", "values")], "each needs its `leaf`"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(answers: list[AnswerSpec], message: str) -> None:
    class Declared(Regression):
        @property
        def answers(self) -> Sequence[AnswerSpec]:
            return answers

    with pytest.raises(ExportError, match=message):
        answers_of(Declared())
