"""What PyTorch's exporter gets wrong is put right before anything else sees the graph."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgewright.edge_runtime import session_on
from edgewright.export.graph.capture import capture
from edgewright.export.graph.exporter_faults import mend
from edgewright.export.graph.model_file import check_file


class Convolutions(nn.Module):
    """Without bias, with one, in groups, padded in other ways, transposed: in `rank` dimensions."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.layers = nn.Sequential(
            conv(2, 4, 3, padding=1, bias=False),
            conv(4, 4, 3, padding="same", groups=2, bias=False),
            conv(4, 4, 3, padding=1, padding_mode="circular", bias=False),
            conv(4, 4, 3, padding=1),
            back(4, 2, 2, 2, bias=False),
        )
        with torch.no_grad():
            self.layers[3].bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).flatten(1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_without_bias_has_none_and_runs(rank, tmp_path):
    torch.manual_seed(0)
    model, x = Convolutions(rank).eval(), torch.randn(2, 2, *[4] * rank)
    graph = capture(model, (x,), ["x"], [{0: "batch"}])
    biased = [node.name for node in graph.graph if "Conv" in node.op_type and len(node.inputs) > 2 and node.inputs[2]]
    assert biased == ["layers.3/Conv"]  # a model's own bias stays, even one of zeros
    assert not any(node.op_type == "CastLike" for node in graph.graph)
    path = tmp_path / "m.onnx"
    ir.save(graph, path)
    check_file(path)
    with torch.no_grad():
        want = model(x)
    for level in ("disabled", "all"):
        got = session_on(path, optimization_level=level).run({"x": x.numpy()})["logits.0"]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_convolution_in_a_branch_is_mended_too():
    x, w = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in "xw")
    zero = ir.node("Constant", [], {"value": ir.tensor(np.zeros((), np.float32))}, name="zero")
    shape = ir.node("Constant", [], {"value": ir.tensor(np.array([4, 2]))}, name="shape")
    bias = ir.node("Expand", [zero.outputs[0], shape.outputs[0]], name="bias")
    conv = ir.node("Conv", [x, w, bias.outputs[0]], name="conv")
    branch = ir.Graph([], list(conv.outputs), nodes=[zero, shape, bias, conv], name="branch")
    condition = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL))
    outer = ir.node("If", [condition], {"then_branch": branch, "else_branch": ir.Graph([], [], nodes=[], name="e")})
    graph = ir.Graph([x, w, condition], list(outer.outputs), nodes=[outer], name="main", opset_imports={"": 20})
    mend(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in branch] == ["Conv"] and len(conv.inputs) == 2


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.top = nn.EmbeddingBag(10, 8, mode="mean"), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.bag(x))


def test_branches_that_are_decided_before_anything_runs_are_gone(tmp_path):
    torch.manual_seed(0)
    model, words = Bag().eval(), torch.arange(8).reshape(2, 4)
    graph = capture(model, (words,), ["words"], [{0: "batch"}])
    path = tmp_path / "m.onnx"
    ir.save(graph, path)
    # in a process of its own: ONNX Runtime died of the nested branches
    program = (
        "import sys, numpy, onnxruntime as o; s = o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']); "
        "print(s.run(None, {'words': numpy.arange(8).reshape(2, 4)})[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        np.testing.assert_allclose(json.loads(done.stdout), model(words), atol=1e-5)
    assert {value.name for value in graph.graph.initializers.values()} >= {"bag.weight", "top.weight", "top.bias"}
