"""A batch without rows has an answer, whatever the operators of the first level make of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgewright.edge_runtime.inference.session import OPTIMIZATION_LEVELS, session_on
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.export.accounts.node_table import exit_specs, flat_costs, node_table
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.row_compaction import compact
from edgewright.export.graph.capture import capture
from edgewright.export.graph.model_file import check_file
from edgewright.export.proof import empty_batch
from edgewright.export.proof.empty_batch import takes_no_rows
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def group_norm():
    """A network whose first level divides by the number of rows, its flat graph and what makes levels of it."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.GroupNorm(2, 4), nn.ReLU())
    base = nn.Sequential(first, nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(16, 3))
    model = MultiExit(base, [HeadSpec("0", 4)], [4], 3, "max_probability").eval()
    flat = capture(model, (X[:2],), ["x"], [{0: "batch"}])
    policy = policy_graphs("max_probability", 3, flat.graph.opset_imports[""], any_rows=True)
    return (
        model,
        flat,
        lambda **options: compact(flat, policy, [0.4], [{"x": X[:2].numpy()}, {"x": X[:3].numpy()}], **options)[0],
    )


@pytest.mark.slow
def test_a_level_that_cannot_run_without_rows_is_found_and_skipped(group_norm, tmp_path):
    model, _, levels = group_norm
    feeds = {"x": X[:2].numpy()}
    assert not takes_no_rows(levels(), feeds)
    guarded = levels(skip_empty=True)
    assert takes_no_rows(guarded, feeds)
    path = tmp_path / "m.onnx"
    ir.save(guarded, path)
    check_file(path)
    for level in OPTIMIZATION_LEVELS:
        runner = session_on(path, optimization_level=level)
        nothing = runner.run({"x": X[:0].numpy()})
        assert {name: (v.shape, v.dtype) for name, v in nothing.items()} == {
            "label": ((0,), np.int64),
            "scores": ((0, 3), np.float32),
            "exit_index": ((0,), np.int64),
        }
        for threshold in (0.0, 0.4, 1.0):
            given = {"x": X.numpy(), "thresholds": np.float32([threshold])}
            label, scores, exit_index = runner.session.run(["label", "scores", "exit_index"], given)
            with torch.no_grad():
                want = model.decide(model.all_logits(X), torch.tensor([threshold]))
            np.testing.assert_array_equal(exit_index, want.exit_index)
            np.testing.assert_array_equal(label, want.label)
            np.testing.assert_allclose(scores, want.scores, atol=1e-5)


def test_the_guard_changes_nothing_of_what_an_exit_costs(group_norm):
    _, flat, levels = group_norm
    costs = flat_costs(flat, {"x": X[:1].numpy()})
    plain, guarded = (exit_specs(node_table(m, costs, {}), ["0", "final"]) for m in (levels(), levels(skip_empty=True)))
    assert plain == guarded and 0 < plain[0].macs < plain[1].macs


def test_a_process_that_dies_is_an_answer(group_norm, monkeypatch):
    monkeypatch.setattr(empty_batch, "_PROGRAM", "import os; os.abort()")
    assert not takes_no_rows(group_norm[1], {"x": X[:2].numpy()})


def test_chained_levels_are_not_run_without_rows():
    class Output:
        def __init__(self, name, shape):
            self.name, self.shape = name, shape

    class Session:
        def get_inputs(self):
            return [Output("x", ["n", 4])]

        def get_outputs(self):
            return [Output("label", ["n"]), Output("scores", ["n", 3]), Output("decided", ["n"])]

        def run(self, *_):
            raise AssertionError("a level ran")

    split = SplitSession([Session(), Session()], ["x"], {})
    label, scores, exit_index = split.run(None, {"x": np.zeros((0, 4), np.float32)})
    assert (label.shape, scores.shape, exit_index.shape) == ((0,), (0, 3), (0,))
    assert (label.dtype, scores.dtype, exit_index.dtype) == (np.int64, np.float32, np.int64)
