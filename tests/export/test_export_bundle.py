"""The whole export: a bundle that verifies, a ledger that proves sharing, and failures that write nothing."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from exported import CASES, share_conv_bases, share_linear_bases, with_exits
from tiny import tiny_residual, tiny_transformer

from edgewright.edge_runtime import load, open_bundle, verify
from edgewright.edge_runtime.bundle.manifest import OperatingPoint
from edgewright.edge_runtime.errors import ExportError, InputError, ParityError
from edgewright.export import ExportOptions, ToleranceOptions, export_bundle
from edgewright.export.accounts.exit_costs import exit_macs
from edgewright.export.accounts.node_table import on_the_graph
from edgewright.export.graph import model_file
from edgewright.export.proof import subject as parity_subject
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.training.evaluation import evaluate


@pytest.mark.slow
@pytest.mark.parametrize(("network", "policy"), CASES)
def test_a_network_with_exits(network, policy, task, tmp_path):
    model = with_exits(network, policy)
    result = export_bundle(model, task, tmp_path / "bundle")
    report = result.manifest.parity
    assert report.max_abs_diff <= 1e-5
    assert report.rows == len(task.splits["test"])
    assert (report.label_agreement, report.exit_agreement) == (1.0, 1.0)
    assert (report.exits_covered, report.exits_total) == (3, 3)
    assert set(report.optimization_levels) == {"disabled", "basic", "extended", "all"}
    assert verify(tmp_path / "bundle").passed
    assert result.manifest.policy.excludes == policy.startswith("class_exclusion")
    want = model(*task.splits["test"].batch(range(24)).inputs)
    np.testing.assert_array_equal(result.exit_index, want.exit_index)
    macs = [e.macs for e in result.manifest.exits]
    assert macs == sorted(macs)
    assert result.mean_macs == pytest.approx(np.mean([macs[i] for i in result.exit_index]))


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_residual, tiny_transformer])
def test_a_plain_network_takes_any_batch_and_costs_what_pytorch_counts(build, task, tmp_path):
    model = build()
    result = export_bundle(model, task, tmp_path / "bundle")
    assert result.manifest.batch == "dynamic"
    cost = count(model, (torch.randn(1, 1, 12, 12),))
    assert result.manifest.exits[0].macs == cost.macs
    assert result.manifest.exits[0].attention_macs == cost.attention_macs
    runner = load(tmp_path / "bundle")
    x = task.splits["test"].batch(range(24)).inputs[0]
    assert runner.predict(x.numpy()).label.shape == (24,)
    correct = (result.label == task.splits["test"].targets.numpy()).mean()
    assert correct == pytest.approx(evaluate(model, task, "test").accuracy)


@pytest.mark.slow
@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_shared_basis_is_stored_once_in_every_file(kind, exits, task, tmp_path):
    if kind == "conv":
        model = share_conv_bases(with_exits("residual") if exits else tiny_residual())
    else:
        model = share_linear_bases(with_exits("transformer") if exits else tiny_transformer())
    ledger = export_bundle(model, task, tmp_path / "bundle").manifest.ledger
    ((name, modules),) = ledger.shared.items()
    assert name.endswith("basis.weight")
    assert len(modules) == (3 if kind == "conv" else 9)
    assert ledger.stored_weight_bytes <= ledger.torch_unique_bytes + 1024
    assert ledger.runtime_weight_bytes <= ledger.stored_weight_bytes + 1024


@pytest.mark.slow
def test_readers_of_one_tensor_compute_the_shared_product_once(task, tmp_path):
    model = share_linear_bases(tiny_transformer())
    manifest = export_bundle(model, task, tmp_path / "bundle").manifest
    basis = next(iter(manifest.ledger.shared))
    row = next(r for r in manifest.ledger.rows if r.name == basis)
    # three layers, one product each: q, k and v read the same tensor
    assert len(row.readers) == 3


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(task, tmp_path):
    for name in ("a", "b"):
        export_bundle(with_exits("residual"), task, tmp_path / name)
    for file in ("model.onnx", "golden.npz", "manifest.json", "edge_runtime.pyz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.slow
def test_metadata_and_operating_points_travel(task, tmp_path):
    model = with_exits("residual")
    stored = tuple(float(t) for t in model.thresholds)
    points = [OperatingPoint("balanced", stored, {"accuracy": 0.5}), OperatingPoint("fast", (0.99, 0.99))]
    export_bundle(model, task, tmp_path / "bundle", operating_points=points, name="mine")
    with open_bundle(tmp_path / "bundle") as bundle:
        assert [p.name for p in bundle.manifest.operating_points] == ["balanced", "fast"]
        assert bundle.manifest.name == "mine"
    properties = {p.key: p.value for p in onnx.load(tmp_path / "bundle" / "model.onnx").metadata_props}
    assert json.loads(properties["edgewright.labels"]) == list(task.labels)
    assert json.loads(properties["edgewright.exits"]) == ["stem", "blocks.1"]


@pytest.mark.slow
def test_failed_parity_writes_nothing_and_leaves_the_old_bundle(task, tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    export_bundle(with_exits("residual"), task, target)
    before = (target / "manifest.json").read_bytes()
    model = with_exits("residual")
    captured = parity_subject.Reference.logits
    monkeypatch.setattr(parity_subject.Reference, "logits", lambda self, x: [z + 0.01 for z in captured(self, x)])
    with pytest.raises(ParityError, match="no bundle was written"):
        export_bundle(model, task, target, ExportOptions(tolerance=ToleranceOptions(abs=1e-6, rel=0.0)))
    assert (target / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_a_folder_that_is_no_bundle_is_left_alone(task, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="no bundle"):
        export_bundle(tiny_residual(), task, tmp_path / "work")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_exits_with_a_dynamic_batch_are_refused(task, tmp_path):
    with pytest.raises(ExportError, match="`compact` for any number"):
        export_bundle(with_exits("residual"), task, tmp_path / "bundle", ExportOptions(batch="dynamic"))


@pytest.mark.slow
def test_weights_beside_the_graph_and_a_dot_in_the_name(task, tmp_path, monkeypatch):
    model, target = with_exits("residual"), tmp_path / "net.v2"
    monkeypatch.setattr(model_file, "BRANCHES_ABOVE", 2000)
    result = export_bundle(model, task, target, ExportOptions(zip=True))
    assert {"model.onnx", "model.onnx.data"} <= set(result.manifest.files)
    assert result.manifest.files["model.onnx.data"].bytes > 2000
    stored = result.manifest.ledger.stored_weight_bytes
    assert result.manifest.ledger.runtime_weight_bytes <= stored + 1024
    assert verify(target).passed
    assert verify(target, optimization_level="disabled").passed
    assert not (tmp_path / "net.zip").exists()
    assert verify(tmp_path / "net.v2.zip").passed
    x = task.splits["test"].batch([0, 1]).inputs[0].numpy()
    for k, thresholds in enumerate([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]):
        # the thresholds are replaced in the graph's bytes, which then have no place of their own
        assert load(target, thresholds=thresholds).predict(x).exit_index.tolist() == [k, k]


def test_a_place_that_cannot_be_written_is_named(task, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="file") as raised:
        export_bundle(tiny_residual(), task, tmp_path / "file" / "bundle")
    assert raised.value.exit_code == 2 and str(tmp_path / "file") in str(raised.value)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(InputError, match="Permission denied; choose another folder") as raised:
        export_bundle(tiny_residual(), task, tmp_path / "bundle")
    assert str(tmp_path) in str(raised.value)


class Parallel(torch.nn.Module):
    """The exit reads a branch that runs last and needs least."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(144, 64), torch.nn.Linear(144, 8)
        self.fc = torch.nn.Linear(72, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc(torch.cat([self.wide(x), self.narrow(x)], dim=1))


@pytest.mark.slow
def test_operating_points_cost_what_the_graph_runs(task, tmp_path):
    torch.manual_seed(0)
    model = MultiExit(Parallel(), [HeadSpec("narrow", 8)], [2], 4, "max_probability").eval()
    narrow, end = exit_macs(model, task, "test")
    in_order = [144 * 72 + 8 * 4, end]  # as PyTorch runs it: the wide branch comes before the exit's
    mean = 0.25 * in_order[0] + 0.75 * in_order[1]
    searched = {
        "exit_share_0": 0.25,
        "exit_share_1": 0.75,
        "mean_macs": mean,
        "mac_share": 1.0,
        "greedy_mean_macs": mean,
    }
    point = OperatingPoint("balanced", (1.0,), searched)
    manifest = export_bundle(model, task, tmp_path / "bundle", operating_points=[point]).manifest
    first, last = (way.macs for way in manifest.exits)
    assert first == narrow == 144 * 8 + 8 * 4 < in_order[0]
    assert last == in_order[1]
    metrics = manifest.operating_points[0].metrics
    assert metrics["mean_macs"] == 0.25 * first + 0.75 * last
    assert metrics["mac_share"] == metrics["mean_macs"] / last
    assert "greedy_mean_macs" not in metrics
    (note,) = [note for note in manifest.notes if "operating point balanced" in note]
    assert f"{metrics['mean_macs']:.0f}" in note and f"{mean:.0f}" in note
    # a search that counted the same is left as it is
    points, notes = on_the_graph([OperatingPoint("same", (1.0,), {**searched, **metrics})], manifest.exits)
    assert points[0].metrics["greedy_mean_macs"] == mean and notes == ()


class Folded(torch.nn.Module):
    """Folds tokens into the batch, as windowed attention does: no shape inference sees through it."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(12, 8)
        self.out = torch.nn.Linear(12 * 8, 4)

    def forward(self, x):
        n = x.shape[0]
        y = self.inner(x.reshape(n * 12, 12)).reshape(n, 12 * 8)
        return self.out(torch.relu(y))


def test_costs_are_told_for_one_row_where_the_batch_is_folded(task, tmp_path):
    model = Folded().train()
    model.inner.eval()
    manifest = export_bundle(model, task, tmp_path / "bundle").manifest
    assert manifest.exits[0].macs == 12 * 12 * 8 + 12 * 8 * 4
    assert (model.training, model.inner.training, model.out.training) == (True, False, True)
