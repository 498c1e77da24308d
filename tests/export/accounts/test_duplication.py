"""What the file stores, held to what the capture needs: copies are refused where they hide, honest models are not."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from exported import share_conv_bases, share_linear_bases, with_exits
from tiny import CLASSES, tiny_residual, tiny_transformer
from torch import nn

from edgewright.edge_runtime.errors import ExportError
from edgewright.export import ExportOptions, bundle, export_bundle
from edgewright.export.accounts.duplication import check_duplication
from edgewright.export.accounts.ledger import build_ledger, shared_bases, stored_bytes
from edgewright.export.graph.capture import capture
from edgewright.models.layers.factorized import FactorizedLinear

IMAGE = (torch.zeros(1, 1, 12, 12),)


def with_copy(model, ending):
    """One reader of an initializer gets a copy of its own."""
    model = model.clone()
    value = next(v for name, v in model.graph.initializers.items() if name.endswith(ending))
    copy = ir.Value(name="copy", type=value.type, shape=value.shape, const_value=value.const_value)
    node, index = next(iter(value.uses()))
    node.replace_input_with(index, copy)
    model.graph.initializers["copy"] = copy
    return model


def duplicating(ending):
    return lambda raw, *arguments, **options: (with_copy(raw, ending), "simplifier: duplicates")


@pytest.mark.slow
def test_a_layer_that_does_not_run_is_no_slack_for_a_copy(task, tmp_path, monkeypatch):
    model = tiny_residual()
    model.spare = nn.Linear(64, 64)
    monkeypatch.setattr(bundle, "simplify", duplicating("conv2.weight"))
    with pytest.raises(ExportError, match="a weight was duplicated"):
        export_bundle(model, task, tmp_path / "bundle")


@pytest.mark.slow
def test_a_small_basis_is_not_copied_within_the_allowance(task, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "simplify", duplicating("basis.weight"))
    with pytest.raises(ExportError, match=r"basis\.weight is shared by .* none of them in the exported file"):
        export_bundle(share_linear_bases(tiny_transformer()), task, tmp_path / "bundle")


@pytest.mark.slow
def test_a_basis_that_the_runtime_keeps_in_two_orders_is_refused():
    model = share_linear_bases(tiny_transformer())
    raw = capture(model, IMAGE, ["image"])
    runtime = raw.clone()
    basis = next(v for name, v in runtime.graph.initializers.items() if name.endswith("basis.weight"))
    turned = ir.tensor(basis.const_value.numpy().T.copy(), name="turned")
    runtime.graph.initializers["turned"] = ir.Value(name="turned", const_value=turned)
    assert check_duplication(model, raw, raw, raw, build_ledger(model, raw, raw, raw, False)) == ()
    with pytest.raises(ExportError, match=r"ONNX Runtime holds the shared basis .* 2 times"):
        check_duplication(model, raw, raw, runtime, build_ledger(model, raw, raw, runtime, False))


def test_weights_that_the_runtime_computes_are_noted():
    model = tiny_transformer()
    raw = capture(model, IMAGE, ["image"])
    runtime = raw.clone()
    folded = ir.tensor(torch.ones(2000).numpy(), name="folded")
    runtime.graph.initializers["folded"] = ir.Value(name="folded", const_value=folded)
    (note,) = check_duplication(model, raw, raw, runtime, build_ledger(model, raw, raw, runtime, False))
    assert str(stored_bytes(raw) + 8000) in note and str(stored_bytes(raw)) in note


class WithTable(nn.Module):
    """A constant that is neither parameter nor buffer, as users write them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.table = torch.randn(144, CLASSES, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return x.flatten(1) @ self.table * self.scale


@pytest.mark.slow
def test_constants_of_a_users_forward_are_no_copies(task, tmp_path):
    ledger = export_bundle(WithTable(), task, tmp_path / "bundle").manifest.ledger
    assert ledger.torch_unique_bytes == 4 * CLASSES
    assert ledger.stored_weight_bytes == 4 * CLASSES + 4 * 144 * CLASSES


@pytest.mark.slow
def test_a_factorized_layer_that_does_not_run_is_not_missed(task, tmp_path):
    model = share_linear_bases(tiny_transformer())
    basis = model.layers[0].attention.q.basis
    model.spare = FactorizedLinear(basis, torch.randn(5, 16), None)
    ledger = export_bundle(model, task, tmp_path / "bundle").manifest.ledger
    ((name, modules),) = shared_bases(model).items()
    assert modules[-1] == "spare"
    assert dict(ledger.shared) == {name: modules[:-1]}


@pytest.mark.slow
def test_copies_that_were_asked_for_are_one_in_each_level(task, tmp_path):
    model = share_conv_bases(with_exits("residual"))
    options = ExportOptions(shared_across_exits="latency")
    ledger = export_bundle(model, task, tmp_path / "bundle", options).manifest.ledger
    assert dict(ledger.shared) == shared_bases(model)
    ((name, modules),) = ledger.shared.items()
    assert len(modules) == 3
    assert sorted(row.name.partition("@")[0] for row in ledger.rows if name in row.name) == [name, name]
