"""A model whose embedding is its head too: stored once, and readers of one basis multiply it once all the same."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from edgewright.export import export_bundle
from edgewright.models.layers.factorized import FactorizedLinear, SharedBasis
from edgewright.pipeline.tasks.causal_lm import CausalLM


class Tied(nn.Module):
    """One attention without positions; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        basis = SharedBasis(0.3 * torch.randn(16, 5))
        self.q, self.k, self.v = (FactorizedLinear(basis, torch.randn(5, 16), None) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        weights = (self.q(x) @ self.k(x).transpose(1, 2) / 4.0).softmax(dim=-1)
        return nn.functional.linear(x + weights @ self.v(x), self.embed.weight)


def test_readers_of_one_basis_multiply_it_once(tmp_path: Path) -> None:
    windows = torch.randint(64, (6, 7), generator=torch.Generator().manual_seed(0))
    made = export_bundle(Tied().eval(), CausalLM({"test": windows}, 64), tmp_path / "b")
    graph = onnx.load(made.path / "model.onnx").graph
    assert sum("q.basis.weight" in node.input for node in graph.node) == 1
    assert made.manifest.ledger.stored_weight_bytes == made.manifest.ledger.torch_unique_bytes
    assert made.manifest.ledger.shared == {"q.basis.weight": ("q", "k", "v")}
