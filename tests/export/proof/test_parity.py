"""What parity excuses, where it says a flip was, which exits it can prove, and logits of extreme size."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported import with_exits
from tiny import CLASSES
from torch import nn

from edgewright.edge_runtime.answers.classes import exits_answer
from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, LABEL, LOGITS, SCORES
from edgewright.edge_runtime.errors import ExportError, ParityError
from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import session_on
from edgewright.export import ExportOptions, ToleranceOptions, export_bundle
from edgewright.export.proof import subject as parity_subject
from edgewright.export.proof.agreement import SMALLEST_SHIFT, Agreement, possible_shifts
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.tasks.image_classification import ImageClassification


def two_exits(policy):
    """Logits are given by hand: the base is not looked at."""
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    return MultiExit(base, [HeadSpec("0", 2), HeadSpec("1", 2)], [2, 2], 2, policy)


def test_a_flip_is_excused_by_the_error_of_the_head_that_decides():
    model = two_exits("max_probability")
    close = torch.log(torch.tensor([[0.8 * 1.0001, 1 - 0.8 * 1.0001]]))  # 5e-5 of a logit from the threshold
    far = torch.log(torch.tensor([[0.99, 0.01]]))
    thresholds = torch.tensor([0.8, 0.8])
    undecided = torch.log(torch.tensor([[0.6, 0.4]]))
    at_first, at_second = [close, far, far], [undecided, close, far]
    # the first head is exact, the second is off by 1e-3
    shifts = possible_shifts([0.0, 5e-4, 1e-6])
    assert shifts == (SMALLEST_SHIFT, 1e-3, 2e-6)
    assert model.margins(at_first, thresholds) == pytest.approx(5e-5, rel=0.01)
    assert model.margins(at_second, thresholds) == pytest.approx(5e-5, rel=0.01)
    assert model.margins(at_first, thresholds, shifts) > max(shifts)
    assert model.margins(at_second, thresholds, shifts) <= max(shifts)


def test_a_flip_names_the_row_of_the_split_and_how_it_was_run():
    check = Agreement(1e-4, 1e-4, [exits_answer("abcd")])
    want = {LABEL: np.array([0, 1, 2]), EXIT_INDEX: np.array([0, 0, 1]), SCORES: np.full((3, 4), 0.25, np.float32)}
    got = {**want, LABEL: np.array([0, 3, 2]), EXIT_INDEX: np.array([0, 0, 0])}
    margin = np.array([1.0, 1e-7, 1.0], np.float32)
    check.answers("exit 1 forced", "test", [4, 8, 15], got, want, margin, 1e-6)
    (flip,) = check.flips
    assert (flip.split, flip.row, flip.kind, flip.case) == ("test", 8, "label", "exit 1 forced")
    assert (flip.torch, flip.onnx) == (1, 3)
    (failure,) = check.failures
    assert "row 15: exit 1 in PyTorch, 0 in ONNX" in failure and "exit 1 forced" in failure


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [None, [0.5, 0.5]])
def test_a_file_that_onnx_runtime_cannot_run_is_a_failure_of_parity(task, tmp_path, monkeypatch, thresholds):
    """Not of this program: the text names the file and the thresholds, and the command line gives 3."""
    made = export_bundle(with_exits("residual"), task, tmp_path / "bundle", parity_rows=2)
    runner = session_on(made.path / "model.onnx", threads=1)

    def broken(*_):
        raise RuntimeError("Non-zero status code returned while running Reshape node")

    monkeypatch.setattr(runner, "session", SimpleNamespace(run=broken))
    reference = parity_subject.Reference(with_exits("residual"), [exits_answer(task.labels)])
    subject = parity_subject.Subject(reference, runner.path, runner.path, task, "test", [0, 1], runner)
    with pytest.raises(ParityError, match=r"model\.onnx \([12] row.*: Non-zero.*Reshape node") as caught:
        subject.answers(subject.inputs([0, 1]), thresholds)
    assert caught.value.exit_code == 3 and ("[0.5, 0.5]" in str(caught.value)) == (thresholds is not None)


@pytest.mark.slow
def test_every_excused_flip_is_listed_with_its_row_and_pytorch_runs_each_row_once(task, tmp_path, monkeypatch):
    answer, logits = parity_subject.Reference.answer, parity_subject.Reference.logits
    ran = []

    def counted(self, inputs):
        ran.extend(row.numpy().tobytes() for row in inputs[0])
        return logits(self, inputs)

    def last_row_on_the_edge(self, logits, thresholds, shifts):
        arrays, margin = answer(self, logits, thresholds, shifts)
        label, margin = arrays[LABEL].copy(), margin.copy()
        label[-1], margin[-1] = (label[-1] + 1) % CLASSES, 0.0
        return {**arrays, LABEL: label}, margin

    monkeypatch.setattr(parity_subject.Reference, "answer", last_row_on_the_edge)
    monkeypatch.setattr(parity_subject.Reference, "logits", counted)
    report = export_bundle(with_exits("residual"), task, tmp_path / "bundle", parity_rows=5).manifest.parity
    assert report.rows == len(ran) == len(set(ran)) == 5
    assert report.label_agreement == pytest.approx(0.8), "runs beside the split do not count in it"
    assert {flip.row for flip in report.excused} == {23}, "the last of five rows spread over 24"
    forced = [f"exit {k} forced" for k in range(3)]
    others = [level for level in OPTIMIZATION_LEVELS if level != "all"]  # at which all else runs
    levels = [f"optimization level {level}{way}" for level in others for way in ("", *(f", {f}" for f in forced))]
    assert Counter(flip.case for flip in report.excused) == Counter(["", *forced, *levels])


def test_flips_in_batches_name_row_and_batch(task, tmp_path, monkeypatch):
    answer = parity_subject.Reference.answer

    def last_row_on_the_edge(self, logits, thresholds, shifts):
        arrays, margin = answer(self, logits, thresholds, shifts)
        # a class that ties with the best: another label, the same number
        best = arrays[LOGITS].max(axis=1)
        arrays[LOGITS][-1] = best[-1]
        margin[-1] = 0.0
        return arrays, margin

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0 + 2e-5]))

        def forward(self, x):
            return x.mean(dim=(1, 2, 3))[:, None].abs() + self.weight

    monkeypatch.setattr(parity_subject.Reference, "answer", last_row_on_the_edge)
    report = export_bundle(Constant(), task, tmp_path / "bundle").manifest.parity
    batches = {flip.case: flip.row for flip in report.excused if flip.case.startswith("batch")}
    assert batches == {"batch of 1": 0, "batch of 2": 1, "batch of 7": 6}


class Linear(nn.Module):
    """Blank images have features of exactly zero."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(144, 8, bias=False)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.inner(x.flatten(1))))


def with_one_telling_row(row=11):
    images = torch.zeros(24, 1, 12, 12)
    images[row] = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0))
    task = ImageClassification({"test": (images, torch.arange(24) % CLASSES)}, [str(i) for i in range(CLASSES)])
    torch.manual_seed(0)
    model = MultiExit(Linear(), [HeadSpec("inner", 8)], [2], CLASSES, "class_exclusion")
    with torch.no_grad():
        model.head(0).linear.bias.zero_()
    return model.eval(), task


def test_a_row_that_reaches_an_exit_is_looked_for_in_the_whole_split(tmp_path):
    model, task = with_one_telling_row()
    report = export_bundle(model, task, tmp_path / "bundle", parity_rows=2).manifest.parity
    assert (report.exits_covered, report.exits_total) == (2, 2)


def test_an_exit_that_no_row_can_take_is_refused_in_its_own_words(tmp_path):
    model, task = with_one_telling_row()
    with torch.no_grad():
        model.head(0).linear.weight.zero_()
    with pytest.raises(ExportError, match=r"exit 0 at 'inner' can be taken by none of the 24 rows.*max_probability"):
        export_bundle(model, task, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_wide_logits_and_a_small_beta(tmp_path):
    # sigmoids that saturate to 0 and 1, exact ties among them, and a threshold far below what float32 keeps apart
    # next to 1
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(64, 1, 12, 12, generator=generator) * torch.linspace(0.2, 3.0, 64)[:, None, None, None]
    task = ImageClassification({"test": (images, torch.arange(64) % CLASSES)}, [str(i) for i in range(CLASSES)])
    model = with_exits("transformer")
    with torch.no_grad():
        for i, linear in enumerate([model.head(0).linear, model.head(1).linear, model.base.fc]):
            linear.bias.zero_()
            linear.weight.mul_(100.0 / model.all_logits(images)[i].std())
        model.thresholds.copy_(torch.tensor([0.005, 0.0009]))
        logits = model.all_logits(images)
        want, margin = model.decide(logits), model.margins(logits)
    assert len(set(want.exit_index.tolist())) == 3
    # 1e-3 is 1e-5 of the logits' size
    options = ExportOptions(tolerance=ToleranceOptions(abs=1e-3))
    manifest = export_bundle(model, task, tmp_path / "bundle", options).manifest
    assert (manifest.parity.exits_covered, manifest.parity.exits_total) == (3, 3)
    clear = (margin > manifest.tolerances.flip_margin).numpy()
    assert len(set(want.exit_index.numpy()[clear].tolist())) == 3 and clear.mean() > 0.5
    for level in OPTIMIZATION_LEVELS:
        runner = session_on(tmp_path / "bundle" / "model.onnx", optimization_level=level)
        got = runner.run_rows({"image": images.numpy()})
        for name, values in (("label", want.label), ("exit_index", want.exit_index)):
            np.testing.assert_array_equal(got[name][clear], values.numpy()[clear])
        np.testing.assert_allclose(got["scores"][clear], want.scores.numpy()[clear], atol=1e-3)
