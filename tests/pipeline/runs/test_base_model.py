"""The model before all stages: what is folded in it stays folded in every checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from recipes_on_disk import TASK, without_later_phases
from torch import nn

from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.store.checkpoint import load_checkpoint, read_checkpoint

MODEL = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.joined = nn.Linear(width, width), nn.Linear(width, width), None

    def forward(self, x):
        return torch.relu(self.joined(x) if self.joined is not None else self.a(x) + self.b(x) + x)

    def reparameterize(self):
        made = nn.Linear(self.a.in_features, self.a.out_features)
        made.weight.data = self.a.weight + self.b.weight + torch.eye(self.a.in_features)
        made.bias.data = self.a.bias + self.b.bias
        self.joined = made
        del self.a, self.b

def net():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(first, Branches(6), nn.Linear(6, 3))
"""


OPTIONS = {"train": {"epochs": 1, "batch_size": 16}, "basis_sharing": {"ratio": 0.1, "min_width": 2}}


def recipe(folder: Path, stages: list[str], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(MODEL)
    (folder / "data.py").write_text(TASK)
    data = {
        "model": {"name": "python:net.py:net", "weights": "trained.pt", **changes},
        "task": {"name": "python:data.py:task", "args": {"splits": ["train", "calibration", "validation", "test"]}},
        "stages": [{"name": name, "id": f"{name}{i}", **OPTIONS[name]} for i, name in enumerate(stages)],
        "benchmark": {"enabled": False},
    }
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    torch.manual_seed(5)
    made = namespace["net"]()  # type: ignore[operator]
    torch.save(made.state_dict(), folder / "trained.pt")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(autouse=True)
def stages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)


FOLDS = {"weights": ["0"], "joined": [["1", "reparameterize"]]}


def test_what_is_folded_stays_folded(tmp_path: Path) -> None:
    path = recipe(tmp_path / "user", ["basis_sharing"])
    result = run(path, tmp_path / "out")
    assert any("by reparameterize(), folded before any compression" in note for note in result.steps[0].notes)
    for step in result.steps:
        place = tmp_path / "out" / step.checkpoint
        assert read_checkpoint(place).base.folds == FOLDS
        model = load_checkpoint(place)
        assert type(model[1]).__name__ == "Branches" and not hasattr(model[1], "a")
    base = load_checkpoint(tmp_path / "out" / result.steps[0].checkpoint)
    assert type(base[0]) is nn.Linear
    weights = torch.load(tmp_path / "user" / "trained.pt")
    x = torch.randn(4, 5)
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    first.load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith("0.")})
    assert torch.allclose(base[0](x), first(x), atol=1e-6)


def test_trainings_that_come_first_train_with_the_branches(tmp_path: Path) -> None:
    path = recipe(tmp_path / "user", ["train", "train", "basis_sharing"])
    result = run(path, tmp_path / "out")
    places = [tmp_path / "out" / step.checkpoint for step in result.steps]
    assert [read_checkpoint(place).base.folds for place in places] == [{}, {}, FOLDS, FOLDS]
    models = [load_checkpoint(place) for place in places]
    assert [hasattr(model[1], "a") for model in models] == [True, True, False, False]
    assert [any("folded before" in note for note in step.notes) for step in result.steps] == [False, False, True, False]
    assert result.steps[2].macs < result.steps[1].macs
    # the first training alone ends folded: another entry of the cache than the same one before a second
    result = run(recipe(tmp_path / "user", ["train"]), tmp_path / "out")
    model = load_checkpoint(tmp_path / "out" / result.steps[1].checkpoint)
    x = torch.randn(4, 5)
    assert not hasattr(model[1], "a") and torch.allclose(model(x), models[1](x), atol=1e-5)


def test_a_recipe_may_leave_everything_as_it_is(tmp_path: Path) -> None:
    path = recipe(tmp_path / "user", ["train"], fold=False)
    result = run(path, tmp_path / "out")
    model = load_checkpoint(tmp_path / "out" / result.steps[1].checkpoint)
    assert hasattr(model[1], "a") and not any("folded" in note for step in result.steps for note in step.notes)
