"""LSTMs and GRUs with shared input matrices: what is exported is the operator, on what the basis has multiplied."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from tiny import TinyRecurrent, tiny_recurrent, tiny_task
from torch import nn

from edgewright.export import export_bundle
from edgewright.models.layers.recurrent import OpenRecurrent
from edgewright.pipeline.stages.basis_sharing.preview import preview
from edgewright.pipeline.stages.basis_sharing.stage import BasisSharingConfig, LayerPatterns, fit
from edgewright.pipeline.store.context import FolderContext


@pytest.mark.slow
def test_the_exported_operator_is_narrower_and_its_basis_is_stored_once(tmp_path: Path) -> None:
    model = tiny_recurrent()
    layers = LayerPatterns(exclude=("gru*",))
    wanted = BasisSharingConfig(groups="readers", share="always", min_width=8, ratio=0.4, layers=layers)
    result = fit(copy.deepcopy(model), tiny_task(), wanted, FolderContext(tmp_path))
    assert result.edit.data["opened"] == ["lstm"], "the GRU is as it was"
    assert type(result.model.gru) is nn.GRU and isinstance(result.model.lstm, OpenRecurrent)
    members = [
        ["lstm.l0.input_gates", "lstm.l0_reverse.input_gates"],
        ["lstm.l1.input_gates", "lstm.l1_reverse.input_gates"],
    ]
    assert [group["members"] for group in result.edit.data["groups"]] == members
    assert any("recurrent ones (16384 bytes) stay whole" in note for note in result.notes)
    bundle = export_bundle(result.model, tiny_task(), tmp_path / "bundle", parity_rows=16)
    graph = onnx.load(str(tmp_path / "bundle" / "model.onnx")).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["LSTM"] >= 2 and operators["GRU"] == 1 and not operators["Tanh"], "no step is written out"
    assert sorted(map(list, bundle.manifest.ledger.shared.values())) == members
    dense = sum(p.numel() for p in model.parameters()) * 4
    assert bundle.manifest.ledger.stored_weight_bytes < dense - 0.35 * 4 * (12 * 128 + 32 * 128)


def test_a_model_that_reads_the_weights_of_its_lstm_keeps_it(tmp_path: Path) -> None:
    class Direct(TinyRecurrent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.lstm.weight_ih_l0.sum()

    torch.manual_seed(0)
    result = fit(Direct().eval(), tiny_task(), BasisSharingConfig(min_width=4), FolderContext(tmp_path))
    assert type(result.model.lstm) is nn.LSTM and "lstm" not in result.edit.data.get("opened", [])


def test_the_preview_knows_what_of_an_lstm_can_be_factors() -> None:
    model = tiny_recurrent()
    rows = tiny_task().splits["calibration"].batch([0, 1]).inputs
    found = preview(model, rows, None, BasisSharingConfig(groups="readers", min_width=8))
    assert found.takes["lstm.l1.input_gates"] == "may share a basis with lstm.l1_reverse.input_gates"
    assert "keeps whole" in found.leaves["lstm.l1.state_gates"] and type(model.lstm) is nn.LSTM
