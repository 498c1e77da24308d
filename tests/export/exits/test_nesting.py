"""Six nested exits and two inputs, one of which every level reads: all forms, at every optimization level."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny import CLASSES
from torch import nn

from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import session_on
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.export.accounts.ledger import graphs
from edgewright.export.exits.control_flow import sink
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.row_compaction import compact
from edgewright.export.exits.split_levels import split_levels
from edgewright.export.graph.capture import capture
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

DEPTH = 6
NAMES = ["tokens", "mask"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x, mask):
        return x + torch.relu(self.mix(x)) * mask[:, :, None]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH + 1))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens, mask):
        weights = mask.to(torch.float32)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, weights)
        return self.head((x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    heads = [HeadSpec(f"blocks.{i}", 8) for i in range(DEPTH)]
    return MultiExit(Masked(), heads, [3] * DEPTH, CLASSES, "max_probability").eval()


def inputs(rows, length=5):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return tokens, (torch.arange(length)[None] < lengths).to(torch.int64)


def forced(model, k):
    return [model.policy.always if i == k else model.policy.never for i in range(DEPTH)]


def same(got, want, rows):
    np.testing.assert_array_equal(got["exit_index"], want.exit_index[:rows])
    np.testing.assert_array_equal(got["label"], want.label[:rows])
    np.testing.assert_allclose(got["scores"], want.scores[:rows], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["single", "compact"])
def test_six_exits_and_two_inputs(model, batch, tmp_path):
    single = batch == "single"
    axes = [{1: "length"} if single else {0: "batch", 1: "length"} for _ in NAMES]
    flat = capture(model, inputs(1 if single else 2), NAMES, axes)
    policy = policy_graphs(model.policy.name, CLASSES, flat.graph.opset_imports[""], any_rows=not single)
    feeds = [dict(zip(NAMES, (v.numpy() for v in inputs(n)), strict=True)) for n in ((1,) if single else (2, 3))]
    never = forced(model, DEPTH)
    one, _ = sink(flat, policy, never) if single else compact(flat, policy, never, feeds)
    path = tmp_path / "model.onnx"
    ir.save(one, path)
    onnx.checker.check_model(str(path))
    nested = dict(graphs(one.graph))
    assert max(place.count(".else") for place in nested) == DEPTH
    given = {v.name for v in one.graph.inputs}
    for place, graph in nested.items():
        assert not place or not given & {v.name for n in graph for v in n.inputs if v is not None}, "a captured input"
        for node in graph:
            if node.op_type == "If":
                then, other = (node.attributes[f"{side}_branch"].as_graph() for side in ("then", "else"))
                pairs = zip(then.outputs, other.outputs, strict=True)
                assert all((a.dtype, list(a.shape)) == (b.dtype, list(b.shape)) for a, b in pairs)
    levels = split_levels(flat, policy, never, feeds)
    for k, level in enumerate(levels.models):
        ir.save(level, tmp_path / f"{k}.onnx")
    rows, length = (1, 7) if single else (9, 7)
    x = inputs(rows, length)
    fed = dict(zip(NAMES, (v.numpy() for v in x), strict=True))
    with torch.no_grad():
        logits = model.all_logits(*x)
    chain = SplitSession([session_on(tmp_path / f"{k}.onnx").session for k in range(DEPTH + 1)], NAMES, levels.row_axes)
    for level in OPTIMIZATION_LEVELS:
        session = session_on(path, thresholds=never, optimization_level=level, threads=1).session
        for thresholds in [forced(model, k) for k in range(DEPTH + 1)] + [[0.3] * DEPTH]:
            want = model.decide(logits, torch.tensor(thresholds))
            given_now = {**fed, "thresholds": np.asarray(thresholds, np.float32)}
            for runner in (session, chain) if level == "all" else (session,):
                got = runner.run(["label", "scores", "exit_index"], given_now)
                same(dict(zip(["label", "scores", "exit_index"], got, strict=True)), want, rows)
