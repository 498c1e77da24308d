"""Bodies of loops and branches of the network's own: what they capture counts as read by the node that holds them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgewright.edge_runtime import session_on
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.export.accounts.ledger import graphs, stored_bytes
from edgewright.export.accounts.node_table import flat_costs, node_table, uncounted
from edgewright.export.exits.control_flow import levels, sink
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.row_axes import LocalSizes, size_nodes
from edgewright.export.exits.row_compaction import compact
from edgewright.export.exits.split_levels import split_levels
from edgewright.export.graph.capture import MODULE_KEY, capture
from edgewright.export.graph.model_file import check_file
from edgewright.export.graph.nested_graphs import nodes_in, reads
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Bags(nn.Module):
    """Behind both exits an `EmbeddingBag`, a loop whose body holds branches: they read weights, and values of every
    level before theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.bag, self.top = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.second(torch.relu(self.first(x)))
        words = (middle[:, :3].abs() * 10).long().clamp(0, 19)
        logits: torch.Tensor = self.top(torch.cat([middle, self.bag(words)], 1))
        return logits


def with_exits():
    torch.manual_seed(0)
    model = MultiExit(Bags(), [HeadSpec("first", 8), HeadSpec("second", 8)], [2, 2], 4, "max_probability")
    return model.eval()


@pytest.fixture(scope="module")
def flat():
    """The model, and its flat graphs for one row and for any number."""
    model = with_exits()
    return model, capture(model, (ROWS[:1],), ["x"]), capture(model, (ROWS[:2],), ["x"], [{0: "batch"}])


def policy_of(model, graph, any_rows):
    return policy_graphs(model.policy.name, model.classes, graph.graph.opset_imports[""], any_rows=any_rows)


def wanted(model, thresholds):
    with torch.no_grad():
        return model.decide(model.all_logits(ROWS), torch.tensor(thresholds))


def same(got, want):
    np.testing.assert_array_equal(got["exit_index"], want.exit_index)
    np.testing.assert_allclose(got["scores"], want.scores, atol=1e-5)


FORCED = ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0])


def test_a_loop_behind_an_exit_is_valid_and_gives_what_pytorch_gives(flat, tmp_path):
    model, one_row, _ = flat
    final, _ = sink(one_row, policy_of(model, one_row, False), [0.5, 0.5])
    path = tmp_path / "m.onnx"
    ir.save(final, path)
    check_file(path)
    for thresholds in FORCED:
        same(session_on(path, thresholds=thresholds).run_rows({"x": ROWS.numpy()}), wanted(model, thresholds))


def test_what_a_body_reads_lies_where_it_can_see_it(flat):
    model, one_row, _ = flat
    level = {node.name: k for node, k in levels(one_row.graph, 3).items()}
    loop = next(node for node in one_row.graph if node.op_type == "Loop")
    inside = list(nodes_in(loop))
    assert {level[node.name] for node in inside} == {2}
    captured = {read.value.name for read in reads(loop)} - {v.name for v in loop.inputs if v is not None}
    assert captured  # at depth too: the If in the body reads what is outside the Loop
    assert any(read.node.graph is not inside[0].graph for read in reads(loop) if read.node is not loop)
    final, _ = sink(one_row, policy_of(model, one_row, False), [0.5, 0.5])
    homes = {name: path for path, graph in graphs(final.graph) for name in graph.initializers}
    assert homes["base.bag.weight"] == "exit0.else/exit1.else"
    assert stored_bytes(final) == stored_bytes(one_row) + 8  # the two thresholds
    table = node_table(final, flat_costs(one_row, {"x": ROWS[:1].numpy()}), level)
    assert {row.exit for row in table if row.name in {node.name for node in inside}} == {2}


def test_rows_that_stay_are_gathered_for_the_body_too(flat, tmp_path):
    model, _, any_rows = flat
    feeds = [{"x": ROWS[:rows].numpy()} for rows in (2, 3)]
    final, _ = compact(any_rows, policy_of(model, any_rows, True), [0.5, 0.5], feeds)
    path = tmp_path / "m.onnx"
    ir.save(final, path)
    check_file(path)
    mixed = 0
    for thresholds in (*FORCED, [0.4, 0.4], [0.35, 0.45]):
        want = wanted(model, thresholds)
        mixed += 1 < int((want.exit_index == 2).sum()) < len(ROWS)
        same(session_on(path, thresholds=thresholds).run({"x": ROWS.numpy()}), want)
    assert mixed


@pytest.mark.parametrize("rows", [1, 8])
def test_a_level_of_its_own_takes_what_its_loop_captures(flat, tmp_path, rows):
    model, one_row, any_rows = flat
    graph = one_row if rows == 1 else any_rows
    feeds = [{"x": ROWS[:n].numpy()} for n in ((1,) if rows == 1 else (2, 3))]
    parts = split_levels(graph, policy_of(model, graph, rows > 1), [0.5, 0.5], feeds)
    sessions = []
    for k, level in enumerate(parts.models):
        path = tmp_path / f"level{k}.onnx"
        ir.save(level, path)
        check_file(path)
        sessions.append(session_on(path).session)
    assert "base.bag.weight" in parts.models[2].graph.initializers
    split = SplitSession(sessions, ["x"], parts.row_axes)
    for thresholds in FORCED:
        want = wanted(model, thresholds)
        given = {"x": ROWS[:rows].numpy(), "thresholds": np.asarray(thresholds, np.float32)}
        _, scores, exit_index = split.run(None, given)
        np.testing.assert_array_equal(exit_index, want.exit_index[:rows])
        np.testing.assert_allclose(scores, want.scores[:rows], atol=1e-5)


def test_nothing_of_this_machine_stays_in_a_body_and_names_are_unique(flat):
    _, one_row, _ = flat
    loop = next(node for node in one_row.graph if node.op_type == "Loop")
    for node in one_row.graph.all_nodes():
        assert set(node.metadata_props) == {MODULE_KEY}
    assert all(node.name.startswith("base.bag/") for node in nodes_in(loop))
    everything = [v.name for node in one_row.graph.all_nodes() for v in node.outputs]
    everything += [v.name for graph in one_row.graphs() for v in [*graph.inputs, *graph.initializers.values()]]
    assert len(set(everything)) == len(everything)
    assert "_empty_nn_module" not in str([node.name for node in one_row.graph])


def branch(name, nodes, outputs):
    return ir.Graph([], outputs, nodes=nodes, name=name)


def value(name, shape=(2, 3), dtype=ir.DataType.FLOAT):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def if_node(condition, then, other, name="If"):
    return ir.node("If", [condition], {"then_branch": then, "else_branch": other}, name=name)


def test_products_in_a_body_are_said_to_be_uncounted_and_others_are_not():
    x, w, condition = value("x"), value("w", (3, 3)), value("c", (), ir.DataType.BOOL)
    plain = ir.node("Relu", [x], name="plain")
    product = ir.node("MatMul", [x, w], name="layer/MatMul")
    harmless = if_node(condition, branch("a", [plain], list(plain.outputs)), branch("b", [], []), "harmless")
    holds = if_node(condition, branch("a", [product], list(product.outputs)), branch("b", [], []), "holds")
    graph = ir.Graph([x, w, condition], [], nodes=[harmless, holds], name="main")
    (note,) = uncounted(ir.Model(graph, ir_version=10))
    assert "layer/MatMul" in note and "harmless" not in note and "how often" in note


def test_a_size_that_branches_compute_is_computed_again_for_the_rows_that_are_left():
    x, condition = value("x", ("n", 3)), ir.node("Constant", [], {"value": ir.tensor(np.array(True))}, name="c")
    shape = ir.node("Shape", [x], name="shape")
    shape.outputs[0].name = "shape"
    copy = ir.node("Identity", [shape.outputs[0]], name="copy")
    other = ir.node("Identity", [shape.outputs[0]], name="other")
    size = if_node(condition.outputs[0], branch("a", [copy], list(copy.outputs)), branch("b", [other], other.outputs))
    size.outputs[0].name = "size"
    nodes = [condition, shape, size]
    sizes = size_nodes(nodes, [x])
    assert size in sizes

    class FirstAxis:
        def of(self, _):
            return 0

    count = value("count", (1,), ir.DataType.INT64)
    local = LocalSizes(sizes, FirstAxis(), {1: count}, dict.fromkeys(nodes, 0))
    again = local.value(size.outputs[0], 1).producer()
    assert again is not size and copy.inputs[0] is shape.outputs[0]
    assert not any(read.value is shape.outputs[0] for read in reads(again))
    concat = next(node for node in local.added[1] if node.op_type == "Concat")
    assert count in concat.inputs and any(read.value is concat.outputs[0] for read in reads(again))
