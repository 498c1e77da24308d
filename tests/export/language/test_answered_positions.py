"""Logits of the tokens that are asked for: where the graph may be cut, and what it then answers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgewright.edge_runtime.bundle.manifest import LOGITS, LOGITS_FROM
from edgewright.export.language.answered_positions import choose_positions

HEAD = "y = MatMul(x, w) a = Add(y, b) logits = Tanh(a)"
"""A head with a bias and a cap."""


def graph_of(body: str) -> ir.Model:
    """A model of x [N, tokens, 2] with the weights w [2, 3] and b [3]."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        net (float[N, tokens, 2] x) => (float[N, tokens, width] logits)
        <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}, float[3] b = {{1, 0, 1}}> {{ {body} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def answers(model: ir.Model, x: np.ndarray, start: int | None) -> np.ndarray:
    """Logits at every level of optimization, which are equal."""
    found = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
        feeds = {"x": x} if start is None else {"x": x, LOGITS_FROM: np.array([start], np.int64)}
        found.append(session.run([LOGITS], feeds)[0])
    np.testing.assert_array_equal(*found)
    return found[0]


@pytest.mark.parametrize("body", [HEAD, "t = Transpose<perm=[0, 1]>(w) y = MatMul(x, t) logits = Identity(y)"])
def test_the_caller_says_from_where_on(body: str) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 2)).astype(np.float32)
    model, plain = graph_of(body), graph_of(body)
    assert choose_positions(model.graph)
    everything = answers(plain, x, None)
    np.testing.assert_array_equal(answers(model, x, None), everything)
    np.testing.assert_array_equal(answers(model, x, -1), everything[:, -1:])
    np.testing.assert_array_equal(answers(model, x, 2), everything[:, 2:])


@pytest.mark.parametrize(
    "body",
    [
        "logits = Softmax(x)",
        # the scores of every token depend on all others
        "t = Transpose<perm=[0, 2, 1]>(x) logits = MatMul(x, t)",
        # something else reads what the head gives
        "y = MatMul(x, w) s = ReduceSum(y) logits = Mul(y, s)",
    ],
)
def test_another_end_is_left_alone(body: str) -> None:
    model = graph_of(body)
    before = [node.name for node in model.graph]
    assert not choose_positions(model.graph)
    assert [node.name for node in model.graph] == before and len(model.graph.inputs) == 1
