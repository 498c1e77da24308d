"""What is wrong with a recipe for this model, this data and this machine is said before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes_on_disk import without_later_phases, write_recipe

from edgewright.pipeline.errors import EdgewrightError, InputError
from edgewright.pipeline.recipe import load_recipe
from edgewright.pipeline.runner import run

TRAIN = {"name": "train", "epochs": 1}


def refused(folder: Path, kind: type[EdgewrightError] = InputError, **changes: Any) -> str:
    """The message with which a recipe is refused; proves that no stage, not even the base, was stored."""
    path = write_recipe(folder, **changes)
    with pytest.raises(kind) as caught:
        run(load_recipe(path), folder / "out")
    assert not list((folder / "out").glob("checkpoints/*")), "something was computed"
    return str(caught.value)


def test_names_that_the_model_does_not_have(tmp_path: Path) -> None:
    exits = {"name": "early_exit", "at": ["3"]}
    assert "no module '3'; the nearest places" in refused(tmp_path / "a", stages=[TRAIN, exits])
    shared = {"name": "basis_sharing", "layers": {"include": ["fc*"]}}
    split = {"name": "python:data.py:task", "args": {"splits": ["train", "calibration", "test"]}}
    assert "'fc*' matches no Linear" in refused(tmp_path / "b", stages=[TRAIN, shared], task=split)


def test_stages_that_find_nothing_to_do_leave_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)
    everything = ["train", "calibration", "validation", "test"]
    path = write_recipe(
        tmp_path,
        task={"name": "python:data.py:task", "args": {"splits": everything}},
        stages=[TRAIN, {"name": "basis_sharing"}, {"name": "early_exit"}],
    )
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(5, 3)\n")
    result = run(load_recipe(path), tmp_path / "out")
    trained, shared, exits = result.steps[-3:]
    assert "it is the whole model" in shared.notes[0] and "no exit was added" in exits.notes[0]
    assert trained.parameters == shared.parameters == exits.parameters and exits.exit_shares == ()
