"""The flat capture: names, metadata, dynamic axes, and what happens to models that cannot be exported."""

from __future__ import annotations

import re

import first_call
import onnx_ir as ir
import pytest
import torch
from exported import NETWORKS, with_exits
from torch import nn

from edgewright.edge_runtime.errors import ExportError
from edgewright.export.graph.capture import MODULE_KEY, capture


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_names_start_with_module_paths_and_are_unique(network):
    model = with_exits(network)
    graph = capture(model, (torch.randn(1, 1, 12, 12),), ["image"]).graph
    paths = {name for name, _ in model.named_modules()}
    for node in graph:
        assert set(node.metadata_props) == {MODULE_KEY}
        path = node.metadata_props[MODULE_KEY]
        assert path in paths
        assert node.name.startswith(f"{path}/")
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    values = [v.name for node in graph for v in node.outputs]
    assert len(set(values)) == len(values)
    assert [v.name for v in graph.outputs] == ["logits.0", "logits.1", "logits.2"]


@pytest.mark.slow
def test_initializers_keep_their_state_dict_names():
    model = with_exits("transformer")
    graph = capture(model, (torch.randn(1, 1, 12, 12),), ["image"]).graph
    # thresholds enter when the branches are built, not in the flat graph
    missing = set(model.state_dict()) - set(graph.initializers) - {"thresholds"}
    assert not missing


def test_the_file_holds_no_path_of_this_machine(tmp_path):
    graph = capture(with_exits("residual"), (torch.randn(1, 1, 12, 12),), ["image"])
    ir.save(graph, tmp_path / "flat.onnx")
    assert not re.search(rb"/[a-z]+/[\w./-]+\.py", (tmp_path / "flat.onnx").read_bytes())


@pytest.mark.slow
def test_dynamic_axes_get_the_tasks_names():
    graph = capture(with_exits("residual"), (torch.randn(2, 1, 12, 12),), ["image"], [{0: "batch"}]).graph
    assert [str(d) for d in graph.inputs[0].shape] == ["batch", "1", "12", "12"]


class Undecided(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4] if bool((x.sum() > 0).item()) else x.flatten(1)[:, 4:8]


def test_data_dependent_control_flow_is_refused_with_advice():
    with pytest.raises(ExportError, match=r"Undecided cannot be exported.*torch\.where"):
        capture(Undecided(), (torch.randn(1, 1, 12, 12),), ["image"])


@pytest.mark.parametrize("network", [first_call.InAttribute, first_call.InList, first_call.WeightNorm])
def test_tables_of_the_first_call_are_captured_and_the_module_stays_as_it_was(network):
    model = network().train()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    capture(model, (torch.randn(2, 3, 8, 8),), ["x"], [{0: "batch"}])
    assert all(module.training for module in model.modules())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_a_model_that_does_not_run_on_the_rows_says_so():
    with pytest.raises(ExportError, match=r"Linear does not run on the example rows \(\[1, 5\]\)"):
        capture(nn.Linear(4, 2), (torch.randn(1, 5),), ["x"])


def test_scripted_parts_are_refused():
    with pytest.raises(ExportError, match="the module '0' is TorchScript"):
        capture(nn.Sequential(torch.jit.script(nn.Linear(4, 2))), (torch.randn(1, 4),), ["x"])
