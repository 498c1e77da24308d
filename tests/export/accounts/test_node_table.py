"""MACs of the exported nodes: equal to PyTorch's count for every operator that multiplies, and no silent zero."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny import CLASSES, tiny_task, tiny_transformer
from torch import nn

from edgewright.export import ExportOptions, export_bundle
from edgewright.export.accounts.node_table import flat_costs, uncounted
from edgewright.export.accounts.operator_costs import Factor, Macs, macs_of
from edgewright.export.graph.capture import capture
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.report.steps import StepRow, measure
from edgewright.pipeline.runs.bundles import Exported, with_bundle


class EinsumAttention(nn.Module):
    """A projection, a product of activations and a mean, all written as einsum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 12, 8))
        self.out = nn.Linear(24, CLASSES)

    def forward(self, x):
        y = torch.einsum("...td,hdk->...thk", x[:, 0], self.weight)
        a = torch.einsum("nthk,nshk->nhts", y, y).softmax(-1)
        y = torch.einsum("nhts,nshk->nthk", a, y)
        return self.out(y.flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(12, 5, batch_first=True, **options)
        self.out = nn.Linear(10 if options.get("bidirectional") else 5, CLASSES)

    def forward(self, x):
        return self.out(self.cell(x[:, 0])[0][:, -1])


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 6, 3, stride=2)
        self.grouped = nn.ConvTranspose2d(6, CLASSES, 3, groups=2)

    def forward(self, x):
        return self.grouped(self.up(x)).mean((2, 3))


def costs_of(model, opset=None):
    """MACs and attention MACs of the whole captured graph, and its operators."""
    model = model.eval()
    flat = capture(model, (torch.randn(2, 1, 12, 12),), ["image"], [{0: "batch"}], opset)
    whole = sum(flat_costs(flat, {"image": np.zeros((1, 1, 12, 12), np.float32)}).values(), Macs())
    assert uncounted(flat) == ()
    return whole, {node.op_type for node in flat.graph}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "operator", "opset"),
    [
        (EinsumAttention, "Einsum", None),
        (lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), "LSTM", None),
        (lambda: Recurrent(nn.RNN), "MatMul", None),
        (Upsampling, "ConvTranspose", None),
        (tiny_transformer, "Attention", 23),
    ],
    ids=["einsum", "lstm", "rnn", "transposed", "fused-attention"],
)
def test_every_operator_costs_what_pytorch_counts(build, operator, opset):
    torch.manual_seed(0)
    model = build()
    whole, operators = costs_of(model, opset)
    assert operator in operators
    counted = count(model, (torch.randn(1, 1, 12, 12),))
    assert (whole.weight, whole.attention) == (counted.macs, counted.attention_macs)
    assert whole.weight > 0


@pytest.mark.slow
def test_a_gru_multiplies_at_every_step_the_first_included():
    # PyTorch's counter leaves out the first step's product with the constant initial state; the operator runs it
    whole, operators = costs_of(Recurrent(nn.GRU))
    assert "GRU" in operators
    assert whole == Macs(12 * 3 * 5 * (12 + 5) + 5 * CLASSES, 0)


def test_attention_counts_grouped_heads_and_the_cache():
    node = ir.node("Attention", [ir.Value(name=n) for n in "qkv"])
    query, keys, values = Factor((2, 8, 5, 4), False), Factor((2, 2, 5, 4), False), Factor((2, 2, 5, 6), False)
    past = Factor((2, 2, 3, 4), False)
    want = 2 * 8 * 5 * 8 * (4 + 6)
    assert macs_of(node, [query, keys, values, None, past], (2, 8, 5, 6)) == Macs(0, want)
    # heads folded into the last axis, as the operator takes them too
    flat = [Factor((2, 5, 32), False), Factor((2, 5, 8), False), Factor((2, 5, 12), False), None, past]
    assert macs_of(node, flat, (2, 5, 48)) == Macs(0, want)
    # learned queries: their product with the keys has a weight as one factor
    learned = [Factor(query.shape, True), keys, values, None, past]
    assert macs_of(node, learned, (2, 8, 5, 6)) == Macs(2 * 8 * 5 * 8 * 4, 2 * 8 * 5 * 8 * 6)


@pytest.mark.parametrize(
    ("equation", "shapes", "constant", "want"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], (False, True), Macs(30, 0)),
        ("ij,jk", [(2, 3), (3, 5)], (False, False), Macs(0, 30)),
        ("ij,ij->ij", [(2, 3), (2, 3)], (False, True), Macs()),
        ("ij->ji", [(2, 3)], (False,), Macs()),
        ("ij,jk->ik", [(2, 3), (3, 5)], (True, True), Macs()),
        # k is summed in the right factor before anything is multiplied
        ("ij,jk->i", [(2, 3), (3, 5)], (False, True), Macs(6, 0)),
        ("...ij,jk->...ik", [(7, 2, 3), (3, 5)], (False, True), Macs(210, 0)),
        ("ij,jk,kl->il", [(2, 3), (3, 5), (5, 4)], (False, True, True), Macs(2 * 3 * 5 + 2 * 5 * 4, 0)),
    ],
)
def test_einsum(equation, shapes, constant, want):
    values = [ir.Value(name=str(i)) for i in range(len(shapes))]
    node = ir.node("Einsum", values, {"equation": equation})
    factors = [Factor(shape, c) for shape, c in zip(shapes, constant, strict=True)]
    assert macs_of(node, factors, ()) == want


@pytest.mark.parametrize(("operator", "domain"), [("DFT", ""), ("LinearAttention", ""), ("FusedMatMul", "vendor")])
def test_what_may_multiply_without_a_formula_is_said(operator, domain):
    x = ir.Value(name="x")
    node = ir.node(operator, [x], domain=domain, name="strange")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    (note,) = uncounted(model)
    assert "strange" in note and "lower bound" in note


@pytest.mark.slow
def test_a_step_says_where_the_graph_and_pytorch_count_differently(tmp_path):
    task = tiny_task(rows={"train": 4, "calibration": 4, "validation": 4, "test": 8})
    torch.manual_seed(0)
    model = Recurrent(nn.GRU).eval()
    row = StepRow(step="gru", stage="train", **measure(model, task, torch.device("cpu")).fields)
    result = export_bundle(model, task, tmp_path / "b", ExportOptions(simplify="none"))
    made = Exported(result.path, result.manifest)
    assert made == Exported.found(tmp_path / "b"), "what travels on is what was written"
    after = with_bundle(row, made)
    assert after.file_bytes > 0
    assert (row.macs_of, after.macs_of) == ("pytorch", "graph") and after.macs == 12 * 15 * 17 + 20 != row.macs
    (note,) = after.notes
    assert f"{12 * 15 * 17 + 20} MACs" in note and f"{row.macs:.0f}" in note
    equal = with_bundle(dataclasses.replace(row, macs=12 * 15 * 17 + 20), made)
    assert equal.notes == (), "nothing is said where both count alike"
