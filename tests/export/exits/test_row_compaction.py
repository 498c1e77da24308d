"""Batches with exits: rows leave when they are decided, and nothing else about them changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime
import pytest
import torch
from exported import NETWORKS, THRESHOLDS, share_conv_bases, with_exits
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import sequence_model
from torch import nn

from edgewright.edge_runtime.errors import ExportError
from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import session_on
from edgewright.export import ExportOptions
from edgewright.export.accounts.ledger import graphs, stored_bytes, torch_unique_bytes
from edgewright.export.bundle import batch_of
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.row_compaction import compact
from edgewright.export.graph.capture import capture
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

CASES = [*(("residual", policy) for policy in THRESHOLDS), ("transformer", "class_exclusion")]


def flat_of(model, shape=(1, 12, 12)):
    return capture(model, (torch.randn(2, *shape),), ["image"], [{0: "batch"}])


def compacted(model, shape=(1, 12, 12), placement="bytes", flat=None):
    flat = flat or flat_of(model, shape)
    policy = policy_graphs(model.policy.name, model.classes, flat.graph.opset_imports[""], any_rows=True)
    feeds = [{"image": np.zeros((rows, *shape), np.float32)} for rows in (2, 3)]
    return compact(flat, policy, model.thresholds.tolist(), feeds, placement)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(network, policy) -> the model and its file."""
    folder, known, flat = tmp_path_factory.mktemp("compact"), {}, {}

    def get(network, policy="class_exclusion"):
        if (network, policy) not in known:
            model = with_exits(network, policy)
            path = folder / f"{network}-{policy}.onnx"
            if network not in flat:  # the policy is no part of it
                flat[network] = flat_of(model)
            ir.save(compacted(model, flat=flat[network])[0], path)
            known[network, policy] = model, path
        return known[network, policy]

    return get


def mixing(model, x):
    """Thresholds with which rows leave everywhere."""
    with torch.no_grad():
        logits = model.all_logits(x)
    thresholds = torch.full((2,), model.policy.never)
    for k, share in enumerate((1 / 3, 2 / 3)):
        few, many = model.policy.never, model.policy.always
        for _ in range(12):
            thresholds[k] = (few + many) / 2
            left = (model.decide(logits, thresholds).exit_index <= k).float().mean()
            few, many = (few, float(thresholds[k])) if left > share else (float(thresholds[k]), many)
    assert len(model.decide(logits, thresholds).exit_index.unique()) == 3
    return thresholds.tolist()


def same(got, want):
    np.testing.assert_array_equal(got["exit_index"], want.exit_index)
    np.testing.assert_array_equal(got["label"], want.label)
    np.testing.assert_allclose(got["scores"], want.scores, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "policy"), CASES)
def test_one_file_serves_every_batch_size_and_every_mix(network, policy, exported):
    model, path = exported(network, policy)
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    never, always = model.policy.never, model.policy.always
    mixed = mixing(model, x)
    for thresholds in ([always, never], [never, always], [never, never], mixed):
        with torch.no_grad():
            want = model.decide(model.all_logits(x), torch.tensor(thresholds))
        for level in OPTIMIZATION_LEVELS if thresholds is mixed else ("all",):
            runner = session_on(path, thresholds=thresholds, optimization_level=level, threads=1)
            for rows in (0, 1, 7, 32):
                got = runner.run({"image": x[:rows].numpy()})
                same(got, type(want)(*(value[:rows] for value in want)))
                assert (got["scores"].dtype, got["label"].dtype) == (np.float32, np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_rows_never_influence_each_other(network, exported):
    model, path = exported(network)
    pool = torch.randn(24, 1, 12, 12, generator=torch.Generator().manual_seed(4))
    runner = session_on(path, thresholds=mixing(model, pool), threads=1)
    pool = np.concatenate([pool.numpy(), np.full((1, 1, 12, 12), np.nan, np.float32)])
    alone = [runner.run({"image": pool[i : i + 1]}) for i in range(len(pool))]
    assert {int(a["exit_index"][0]) for a in alone} == {0, 1, 2}
    assert np.isnan(alone[-1]["scores"]).all() and alone[-1]["exit_index"] == [2], "NaN is reported"

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(0, len(pool) - 1), min_size=0, max_size=12))
    def any_batch(rows):
        got = runner.run({"image": pool[rows]})
        for place, row in enumerate(rows):
            assert got["exit_index"][place] == alone[row]["exit_index"][0]
            assert got["label"][place] == alone[row]["label"][0]
            np.testing.assert_allclose(got["scores"][place], alone[row]["scores"][0], atol=1e-5)

    any_batch()


@pytest.mark.slow
def test_a_level_that_no_row_needs_does_not_run(exported, tmp_path):
    _, path = exported("residual")
    x = torch.randn(5, 1, 12, 12).numpy()
    convolutions, finished = [], []
    for k, thresholds in enumerate([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / f"exit{k}")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {"image": x, "thresholds": np.asarray(thresholds, np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        ran = [e for e in events if e["name"].endswith("_kernel_time")]
        convolutions.append(sum(e["args"]["op_name"] == "Conv" for e in ran))
        finished.append(any("exits.final" in e["name"] for e in ran))
    assert finished == [False, False, True]
    assert 0 < convolutions[0] < convolutions[1] < convolutions[2]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_is_plain_onnx_and_branches_agree(network, exported):
    _, path = exported(network)
    final = ir.load(path)
    inputs = {v.name for v in final.graph.inputs}
    assert {n.domain for n in final.graph.all_nodes()} == {""}
    names = [n.name for n in final.graph.all_nodes()]
    assert len(set(names)) == len(names)
    values = [v.name for n in final.graph.all_nodes() for v in n.outputs]
    assert len(set(values)) == len(values)
    for path_in_file, graph in graphs(final.graph):
        if path_in_file:
            assert not inputs & {v.name for n in graph for v in n.inputs if v is not None}
        for node in graph:
            if node.op_type == "If":
                then, other = (node.attributes[f"{side}_branch"].as_graph() for side in ("then", "else"))
                for a, b in zip(then.outputs, other.outputs, strict=True):
                    assert (a.dtype, list(a.shape)) == (b.dtype, list(b.shape))


def test_a_shared_convolution_basis_is_stored_once():
    model = share_conv_bases(with_exits("residual"))
    final, notes = compacted(model)
    assert stored_bytes(final) <= torch_unique_bytes(model)
    assert any("stored once" in note for note in notes)


def test_rows_may_lie_in_any_axis_and_sizes_follow_them(tmp_path):
    model = sequence_model()
    final, _ = compacted(model, (5, 6))
    ir.save(final, tmp_path / "model.onnx")
    gathers = {n.name: n.attributes["axis"].as_int() for n in final.graph.all_nodes() if "@rows" in (n.name or "")}
    assert set(gathers.values()) == {0, 1}, "the stream has its rows in axis 1"
    x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(1))
    for threshold in (0.0, 0.8, 0.9, 1.0):
        with torch.no_grad():
            want = model.decide(model.all_logits(x), torch.tensor([threshold]))
        runner = session_on(tmp_path / "model.onnx", thresholds=[threshold], threads=1)
        same(runner.run({"image": x.numpy()}), want)


class Windows(nn.Module):
    """Folds its tokens [N, 4, 8] into windows in two blocks of the same sizes, which a simplifier computes once."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        # the number of rows is known here, the size of a window only behind the first exit
        x = self.one(x.view(x.shape[0], 4, 2, 4).transpose(2, 3).reshape(x.shape[0], 4, 8))
        for block in (self.two, self.three):
            x = block(x.view(x.shape[0], 2, 2, 8).transpose(1, 2).reshape(x.shape[0], 4, 8))
        return self.fc(x.mean(dim=1))


def test_sizes_that_two_levels_share_follow_the_rows_of_each(tmp_path):
    torch.manual_seed(0)
    model = MultiExit(Windows(), [HeadSpec("one", 8), HeadSpec("two", 8)], [3, 3], 4, "max_probability").eval()
    flat = flat_of(model, (4, 8))
    ir.passes.common.CommonSubexpressionEliminationPass()(flat)
    ir.save(compacted(model, (4, 8), flat=flat)[0], tmp_path / "model.onnx")
    x = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(1))
    mixed = mixing(model, x)
    with torch.no_grad():
        want = model.decide(model.all_logits(x), torch.tensor(mixed))
    runner = session_on(tmp_path / "model.onnx", thresholds=mixed, threads=1)
    same(runner.run({"image": x.numpy()}), want)


def test_rows_folded_into_another_axis_are_refused_by_name():
    with pytest.raises(ExportError, match=r"the value '.*' .*has shape \[10, 8\] for 2 rows.*set .*single"):
        compacted(sequence_model(fold=True), (5, 6))


def test_a_model_without_exits_has_nothing_to_compact():
    assert batch_of(with_exits("residual").base, ExportOptions(batch="compact")) == "dynamic"
