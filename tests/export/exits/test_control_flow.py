"""Sinking: real `If`s, weights where they belong, thresholds that can be overridden, every branch equal to PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import CASES, NETWORKS, share_conv_bases, share_linear_bases, with_exits
from tiny import CLASSES
from torch import nn

from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import session_on
from edgewright.export.accounts.ledger import graphs, stored_bytes, torch_unique_bytes
from edgewright.export.exits.control_flow import levels, sink
from edgewright.export.exits.policy_graph import policy_graphs, splice
from edgewright.export.graph.capture import capture
from edgewright.export.graph.simplify import simplify
from edgewright.models.layers.exit_policies import policy_named
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.models.zoo.residual import resnet_small

IDS = [f"{n}-{p}" for n, p in CASES]


def sunk(model, placement="bytes", method="none"):
    x = torch.randn(1, 1, 12, 12)
    flat, _ = simplify(capture(model, (x,), ["image"]), method, {"image": x.numpy()})
    graph_policy = policy_graphs(model.policy.name, model.classes, flat.graph.opset_imports[""])
    return flat, *sink(flat, graph_policy, model.thresholds.tolist(), placement)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "policy"), CASES, ids=IDS)
def test_every_forced_exit_equals_pytorch_at_every_optimization_level(network, policy, tmp_path):
    model = with_exits(network, policy)
    _, final, _ = sunk(model)
    path = tmp_path / "model.onnx"
    ir.save(final, path)
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    never, always = model.policy.never, model.policy.always
    for k, thresholds in enumerate([[always, never], [never, always], [never, never]]):
        with torch.no_grad():
            want = model.decide(model.all_logits(x), torch.tensor(thresholds))
        assert (want.exit_index == k).all()
        for level in OPTIMIZATION_LEVELS:
            got = session_on(path, thresholds=thresholds, optimization_level=level).run_rows({"image": x.numpy()})
            np.testing.assert_array_equal(got["exit_index"], want.exit_index)
            np.testing.assert_array_equal(got["label"], want.label)
            np.testing.assert_allclose(got["scores"], want.scores, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_node_and_weight_lies_at_the_depth_that_needs_it(network):
    model = with_exits(network)
    flat, final, _ = sunk(model)
    level = {node.name: k for node, k in levels(flat.graph, 3).items()}
    assert set(level.values()) == {0, 1, 2}
    for path, graph in graphs(final.graph):
        depth = path.count(".else")
        for node in graph:
            if node.name in level:
                assert level[node.name] == depth
        for value in graph.initializers.values():
            if value.name == "thresholds":
                continue
            depths = {level[node.name] for node, _ in value.uses() if node.name in level}
            assert min(depths) == depth
    assert sum(node.op_type == "If" for node in final.graph.all_nodes()) == 2


def test_names_are_unique_over_all_nested_graphs():
    _, final, _ = sunk(with_exits("residual"))
    nodes = [node.name for node in final.graph.all_nodes()]
    values = [v.name for node in final.graph.all_nodes() for v in node.outputs]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)


def test_thresholds_are_one_outer_initializer():
    model = with_exits("residual")
    _, final, _ = sunk(model)
    value = final.graph.initializers["thresholds"]
    np.testing.assert_allclose(value.const_value.numpy(), model.thresholds)


def test_both_branches_have_equal_types_and_shapes():
    _, final, _ = sunk(with_exits("transformer"))
    for node in final.graph.all_nodes():
        if node.op_type == "If":
            then, other = (node.attributes[f"{side}_branch"].as_graph() for side in ("then", "else"))
            for a, b in zip(then.outputs, other.outputs, strict=True):
                assert (a.dtype, list(a.shape)) == (b.dtype, list(b.shape))


@pytest.mark.slow
def test_a_convolution_basis_over_exits_is_stored_once_or_per_branch():
    model = share_conv_bases(with_exits("residual"))
    _, once, notes = sunk(model, "bytes")
    assert stored_bytes(once) <= torch_unique_bytes(model)
    assert any("stored once" in note for note in notes)
    _, copied, notes = sunk(model, "latency")
    basis = model.base.blocks[0].conv1.basis.weight
    # block 0 and 1 lie in level 1, block 2 in level 2: one copy more
    assert stored_bytes(copied) == stored_bytes(once) + basis.numel() * 4
    assert any("2 times" in note for note in notes)


@pytest.mark.slow
def test_a_matmul_basis_over_exits_is_one_initializer():
    _, final, _ = sunk(share_linear_bases(with_exits("transformer")))
    holders = [p for p, g in graphs(final.graph) for v in g.initializers if v.endswith("basis.weight")]
    assert holders == [""]


@pytest.mark.parametrize("level", [0, 1, 2, 99])
def test_thresholds_can_be_overridden_by_add_initializer(level, tmp_path):
    # what a program without edge_runtime does on the device; a folded Gather would lose it without a word
    model = with_exits("residual")
    _, final, _ = sunk(model)
    ir.save(final, tmp_path / "model.onnx")
    x = torch.randn(1, 1, 12, 12).numpy()
    for k, thresholds in enumerate([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(thresholds, np.float32))
        options.add_initializer("thresholds", value)
        session = onnxruntime.InferenceSession(
            str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        assert session.run(["exit_index"], {"image": x})[0] == [k]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "most"),
    [("class_exclusion", 12), ("class_exclusion_permanent", 14), ("max_probability", 4), ("entropy", 7)],
)
def test_an_exit_costs_few_nodes(policy, most, tmp_path):
    # every node is about a microsecond on a processor; see docs/early_exit.md
    _, final, _ = sunk(with_exits("residual", policy))
    for path, graph in graphs(final.graph):
        own = [n for n in graph if n.name.startswith("exits.") and n.op_type != "Constant"]
        assert len(own) <= (2 if path.endswith(".then") else most), [n.name for n in own]
        assert all(len(n.outputs) == 2 for n in graph if n.op_type == "If")
    kinds = [n.op_type for n in final.graph.all_nodes()]
    assert kinds.count("ArgMax") == kinds.count("Split") == 1
    assert "Neg" not in kinds, "the head's product gives the negated logits"


@pytest.mark.parametrize("name", ["class_exclusion", "class_exclusion_permanent"])
def test_the_exported_rule_tells_saturated_sigmoids_apart(name, tmp_path):
    """Beyond 17 float32 sigmoids are all 1; the graph decides as PyTorch, by the logits."""
    policy = policy_named(name)
    generator = torch.Generator().manual_seed(0)
    logits = 60.0 * torch.rand(400, 5, generator=generator) + torch.tensor([17.5, -80.0])[torch.arange(400) % 2, None]
    before = torch.rand(400, 5, generator=generator) < 0.4
    before[:, 0] = False
    ir.save(policy_graphs(name, 5, 20, any_rows=True).next, tmp_path / "next.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "next.onnx", providers=["CPUExecutionProvider"])
    for beta in (0.0, 0.3, 0.99, 1.0):
        want = policy.decide(logits, torch.tensor(beta), before)
        feeds = {"logits": logits.numpy(), "threshold": np.array(beta, np.float32), "excluded": before.numpy()}
        decided, scores, excluded = session.run(None, feeds)
        near = policy.margin(logits, torch.tensor(beta), before).numpy() < 1e-5
        assert near.mean() < 0.01
        np.testing.assert_array_equal(decided[~near], want.decided[~near])
        np.testing.assert_array_equal(excluded[~near], want.excluded[~near])
        np.testing.assert_array_equal(scores[~near], want.scores[~near])
        # of those that were out, the class of the largest logit alone comes back
        returned = before & ~want.excluded
        best = torch.nn.functional.one_hot(logits.argmax(dim=1), 5).to(torch.bool)
        assert not (returned & ~best).any() and returned.any() == (name == "class_exclusion")


def test_a_negation_is_folded_only_where_nobody_else_reads_the_logits():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4]))
    for readers in (0, 1):
        product = ir.node("Gemm", [x, x], {"alpha": 0.5, "transB": 1}, name="head")
        logits = product.outputs[0]
        logits.name = "logits.0"
        others = [ir.node("Relu", [logits]) for _ in range(readers)]
        threshold = ir.Value(name="t", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        nodes: list[ir.Node] = []
        splice(policy_graphs("class_exclusion", 4, 20).first, [logits, threshold], nodes, "exits.0")
        assert [n.op_type for n in nodes].count("Neg") == len(others)
        assert product.attributes["alpha"].as_float() == (0.5 if others else -0.5)
        assert ("beta" in product.attributes) == (not others)


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 20])
def test_additions_of_a_residual_stream_stay_inside_convolutions(width, tmp_path):
    torch.manual_seed(1)
    base = resnet_small(classes=CLASSES, widths=(width,), blocks=3)
    heads = [HeadSpec("stem", width), HeadSpec("stages.stage0.block0", width)]
    model = MultiExit(base, heads, [4, 4], CLASSES, "class_exclusion").eval()
    flat, final, _ = sunk(model, method="onnxscript")
    copies = [n for n in final.graph.all_nodes() if n.attributes.get_int("group", 1) == width]
    assert [n.inputs[0].name for n in copies] == ["base.stem.2/Relu", "base.stages.stage0.block0/Relu_1"]
    ones = [n.inputs[1].producer().attributes["value"].as_tensor().numpy() for n in copies]
    assert all((one == 1).all() and one.shape == (width, 1, 1, 1) for one in ones), "the identity"
    alone = {}
    for name, kept in (("flat", flat), ("sunk", final)):
        ir.save(kept, tmp_path / f"{name}.onnx")
        session_on(tmp_path / f"{name}.onnx", optimized_path=tmp_path / f"{name}.optimized.onnx")
        optimized = list(ir.load(tmp_path / f"{name}.optimized.onnx").graph.all_nodes())
        if not any(n.domain == "com.microsoft.nchwc" for n in optimized):
            pytest.skip("ONNX Runtime has no blocked layout on this processor")
        alone[name] = [n.name for n in optimized if n.op_type == "Add" and n.name.startswith("base.")]
    assert alone == {"flat": [], "sunk": []}


def test_a_caller_may_set_thresholds_per_run(tmp_path):
    model = with_exits("residual")
    _, final, _ = sunk(model)
    ir.save(final, tmp_path / "model.onnx")
    session = session_on(tmp_path / "model.onnx").session
    assert [v.name for v in session.get_inputs()] == ["image"], "thresholds have a default and need not be given"
    x = torch.randn(1, 1, 12, 12).numpy()
    for k, thresholds in enumerate([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]):
        feeds = {"image": x, "thresholds": np.asarray(thresholds, np.float32)}
        assert session.run(["exit_index"], feeds)[0] == [k]


class ReadsTwice(nn.Module):
    """Its second half reads the input again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(14, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.cat([self.first(x), x], dim=1))))


def test_no_branch_captures_an_input_of_the_graph(tmp_path):
    torch.manual_seed(2)
    model = MultiExit(ReadsTwice(), [HeadSpec("first", 8)], [2], CLASSES, "class_exclusion").eval()
    x = torch.randn(1, 6)
    flat = capture(model, (x,), ["x"])
    policy = policy_graphs("class_exclusion", CLASSES, flat.graph.opset_imports[""])
    ir.save(sink(flat, policy, [0.0])[0], tmp_path / "model.onnx")
    got = session_on(tmp_path / "model.onnx", optimized_path=tmp_path / "optimized.onnx").run({"x": x.numpy()})
    np.testing.assert_allclose(got["scores"], model(x).scores.detach(), atol=1e-6)
    for name in ("model", "optimized"):
        for path, graph in graphs(ir.load(tmp_path / f"{name}.onnx").graph):
            assert not path or not any(v.name in ("x", "thresholds") for n in graph for v in n.inputs if v is not None)
