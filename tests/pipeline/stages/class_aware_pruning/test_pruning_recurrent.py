"""Units of LSTMs and GRUs go like filters: all gates of a unit together, and what reads its state."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny import CLASSES, TinyRecurrent, tiny_recurrent, tiny_task
from torch import Tensor, nn

from edgewright.export import export_bundle
from edgewright.models.layers.recurrent import OpenRecurrent
from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.opening import RECURRENT, open_layers
from edgewright.pipeline.stages.class_aware_pruning import ClassAwarePruningConfig, fit, rebuild
from edgewright.pipeline.stages.class_aware_pruning.scored_samples import ScoredSamples
from edgewright.pipeline.stages.class_aware_pruning.scores import ScoringSettings, collect
from edgewright.pipeline.store.context import FolderContext

X = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """A recurrent layer, and one way to read it."""

    def __init__(self, kind: Any, layers: int, both: bool, read: Callable[[Tensor, Any], Tensor], given: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = kind(6, 12, num_layers=layers, bidirectional=both, batch_first=True)
        self.head = nn.Linear(24 if both else 12, 5)
        self.read, self.size, self.given = read, 12, given

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.rnn(x, *((torch.zeros(1, len(x), self.size),) if self.given else ()))
        logits: Tensor = self.head(self.read(states, last))
        return logits


CASES = {
    "outputs": (nn.LSTM, 1, False, lambda y, _: y[:, -1], False, 1),
    "last state of an LSTM": (nn.LSTM, 1, False, lambda _, last: last[0][-1], False, 1),
    "last state above": (nn.GRU, 2, False, lambda _, last: last[-1], False, 2),
    "a state is given": (nn.GRU, 1, False, lambda y, _: y.mean(dim=1), True, 1),
    "two layers in both directions": (nn.LSTM, 2, True, lambda y, _: y.amax(dim=1), False, 4),
    "both last states": (nn.GRU, 1, True, lambda _, last: torch.cat((last[-2], last[-1]), dim=1), False, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_without_units_is_the_same_as_with_units_that_nobody_reads(case: str) -> None:
    kind, layers, both, read, given, count = CASES[case]
    model = Reader(kind, layers, both, read, given).eval()
    expected = model(X)
    assert list(open_layers(model, (X,), RECURRENT)) == ["rnn"]
    assert torch.allclose(model(X), expected, atol=1e-6)
    channels = find_channels(model, (X,))
    assert [group.units for group in channels.groups] == [12] * count
    for group in channels.groups:
        gates = 4 if kind is nn.LSTM else 3
        assert group.members[(group.producers[0], "out")].tolist() == torch.arange(12 * gates).view(12, gates).tolist()
    keep = channels.keep({group.name: torch.arange(2 + i, 12) for i, group in enumerate(channels.groups)})
    small, full = surgery.pruned(model, keep), surgery.masked(model, keep)
    assert torch.allclose(small(X), full(X), atol=1e-6) and not torch.allclose(small(X), expected, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_half_of_it_goes_and_the_exported_operators_are_narrower(tmp_path: Path) -> None:
    model = tiny_recurrent()
    config = ClassAwarePruningConfig(target_mac_reduction=0.5, max_drop=1.0, images_per_class=4, retrain={"epochs": 1})
    result = fit(copy.deepcopy(model), tiny_task(), config, FolderContext(tmp_path))
    assert result.metrics["mac_reduction"] > 0.45 and result.edit.data["opened"] == ["lstm", "gru"]
    again = rebuild(copy.deepcopy(model), result.edit)
    again.load_state_dict(result.model.state_dict())
    rows = tiny_task().splits["test"].batch([0, 1, 2]).inputs
    assert torch.equal(again(*rows), result.model(*rows))
    bundle = export_bundle(result.model, tiny_task(), tmp_path / "bundle", parity_rows=16)
    operators = Counter(node.op_type for node in onnx.load(str(tmp_path / "bundle" / "model.onnx")).graph.node)
    assert operators["LSTM"] >= 2 and operators["GRU"] == 1 and not operators["Tanh"], "no step is written out"
    dense = sum(p.numel() for p in model.parameters()) * 4
    assert bundle.manifest.ledger.stored_weight_bytes < 0.7 * dense


def test_what_is_excluded_or_read_directly_is_as_it_was(tmp_path: Path) -> None:
    class Direct(TinyRecurrent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.lstm.weight_hh_l1.sum()

    torch.manual_seed(0)
    config = ClassAwarePruningConfig(target_mac_reduction=0.05, max_drop=1.0, images_per_class=2, retrain={"epochs": 0})
    result = fit(Direct().eval(), tiny_task(), config, FolderContext(tmp_path / "direct"))
    assert type(result.model.lstm) is nn.LSTM and isinstance(result.model.gru, OpenRecurrent), (
        "one keeps no other closed"
    )
    assert result.edit.data["opened"] == ["gru"]
    excluded = config.model_copy(update={"exclude": ("lstm",)})
    result = fit(tiny_recurrent(), tiny_task(), excluded, FolderContext(tmp_path / "excluded"))
    assert type(result.model.lstm) is nn.LSTM and isinstance(result.model.gru, OpenRecurrent)


class Steps(nn.Module):
    """The rows of an image as steps; time comes first, or the rows of the batch do."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.out = nn.Linear(12, 20), nn.Linear(20, CLASSES)
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        steps = x[:, 0]
        lifted = self.lift(steps.transpose(0, 1)).transpose(0, 1) if self.time_first else self.lift(steps)
        logits: Tensor = self.out(torch.relu(lifted).mean(dim=1))
        return logits


@pytest.mark.parametrize("batch_size", [4, 5])
def test_samples_are_scored_apart_where_time_comes_first(batch_size: int, tmp_path: Path) -> None:
    """Four rows divide the twelve steps, five do not."""
    task = tiny_task()
    samples, settings = ScoredSamples(task, task.splits["calibration"]), ScoringSettings(batch_size=batch_size)
    found = [
        collect(Steps(time_first).eval(), ["lift"], samples, settings, FolderContext(tmp_path))["lift"]
        for time_first in (False, True)
    ]
    assert torch.equal(found[0].class_count, found[1].class_count) and torch.allclose(found[0].taylor, found[1].taylor)
    assert torch.allclose(found[0].fisher, found[1].fisher)
