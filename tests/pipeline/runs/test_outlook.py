"""`edgewright check`: what each stage would do, before anything is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_on_disk import write_recipe
from rich.console import Console
from torch import nn

from edgewright.edge_runtime.targets.target import target_named
from edgewright.pipeline.cli import main
from edgewright.pipeline.outlook_text import show
from edgewright.pipeline.recipe.recipe import load_recipe, parse_recipe
from edgewright.pipeline.runs.outlook import ExportOutlook, Outlook, StageOutlook, _aligned, outlook
from edgewright.pipeline.stage import Preview

MORE = """

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 8, 3), nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else -self.body(x)


def video():
    return nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3))


def two():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return {"features": x, "values": self.b(x)}

    return Two()
"""


def _folder(tmp_path: Path, **changes: Any) -> Path:
    path = write_recipe(tmp_path, **changes)
    with (tmp_path / "net.py").open("a") as file:
        file.write(MORE)
    return path


def _model(tmp_path: Path, name: str, shape: tuple[int, ...], export: bool = False) -> Outlook:
    _folder(tmp_path)
    recipe = parse_recipe({"model": f"python:net.py:{name}", "task": "none"}, tmp_path)
    return outlook(recipe, shape, alone=True, export=export)


def _of(found: Outlook, stage: str) -> StageOutlook:
    return next(one for one in found.stages if one.stage == stage)


@pytest.mark.slow
def test_a_recipe_is_looked_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stages: list[Any] = [
        {"name": "train", "epochs": 3},
        {"name": "class_aware_pruning", "score_split": "train", "target_mac_reduction": 0.4},
        {"name": "basis_sharing", "whitening": "none", "min_width": 3},
        {"name": "early_exit", "at": ["1"]},
    ]
    recipe = _folder(tmp_path, stages=stages, model={"name": "python:net.py:net", "args": {"width": 24}})
    assert main(["check", str(recipe), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "trains 219 parameters for 3 epochs on 96 samples" in out
    assert "nothing was trained" in out and "onnxruntime 1.18 and newer read it" in out
    told = json.loads((tmp_path / "out.json").read_text())
    _, prune, share, exits = told["stages"]
    assert [stage["refused"] for stage in told["stages"]] == [None] * 4 and told["refused"] is False
    assert prune["preview"]["takes"] == {"0": "20 of 24 channels"}
    assert "class_coverage_fpgm" in prune["preview"]["summary"] and "40% is asked for" in prune["preview"]["summary"]
    assert prune["preview"]["leaves"] == {"2": "it produces the model's output"}
    assert set(share["preview"]["takes"]) == {"0"} and share["preview"]["leaves"] == {"2": "gives the logits"}
    assert "an exit" in exits["preview"]["takes"]["1"]
    assert told["export"]["answers"] == {"logits": "classes"} and told["export"]["refused"] is None
    assert {target["target"] for target in told["export"]["targets"]} >= {"x86", "x86_vnni"}
    assert not (tmp_path / "build").exists()


def test_what_a_run_would_refuse_is_said_for_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages: list[Any] = [
        {"name": "class_aware_pruning", "score_split": "train", "target_mac_reduction": 0.95},
        {"name": "early_exit", "at": ["nowhere"]},
    ]
    found = outlook(load_recipe(_folder(tmp_path, stages=stages)), None, alone=False, export=False)
    prune, exits = found.stages
    assert prune.refused is not None and "cannot be reached" in prune.refused
    assert exits.refused is not None and "nowhere" in exits.refused
    assert found.refused and found.export is None
    assert main(["check", str(tmp_path / "recipe.yaml"), "--no-export"]) == 2
    assert capsys.readouterr().out.count("refused") == 2


def test_a_model_alone_is_shown_to_every_stage(tmp_path: Path) -> None:
    found = _model(tmp_path, "Residual", (1, 1, 12, 12))
    prune, share = _of(found, "class_aware_pruning").preview, _of(found, "basis_sharing").preview
    assert prune is not None and share is not None
    assert set(prune.takes) == {"blocks.0.a", "blocks.1.a"}
    assert "residual stream" in prune.leaves["blocks.0.b"] and "output" in prune.leaves["head"]
    assert share.takes["blocks.0.a"] == "may share a basis with blocks.1.a" and share.figures["sharing_groups"] == 2
    assert "stem" in share.leaves["stem"]
    places = _of(found, "early_exit").preview
    assert places is not None and "blocks.0" in places.takes
    assert not found.refused and found.task is None


def test_the_streams_are_named_where_they_would_reach_the_target(tmp_path: Path) -> None:
    stages = [{"name": "class_aware_pruning", "score_split": "train", "min_width": 0.7}]
    model, data = "python:net.py:Residual", tmp_path / "data.py"
    recipe = _folder(tmp_path, stages=stages, model=model)
    data.write_text(
        data.read_text().replace("rows, 5,", "rows, 1, 12, 12,").replace("x[torch.arange(rows), y] += 4.0", "")
    )
    found = outlook(load_recipe(recipe), None, alone=False, export=False)
    preview = found.stages[0].preview
    assert preview is not None and preview.notes and "50% is out of reach" in preview.notes[0]


def test_several_outputs_are_exported_by_name(tmp_path: Path) -> None:
    found = _model(tmp_path, "two", (1, 5), export=True)
    assert found.export is not None and found.export.refused is None
    assert found.export.answers == {"features": "values", "values": "values"}
    exits = _of(found, "early_exit")
    assert exits.refused is not None and "no logits" in exits.refused and not found.refused


def test_a_model_that_does_not_export_is_told_before_training(tmp_path: Path) -> None:
    found = _model(tmp_path, "Branching", (1, 5), export=True)
    assert found.export is not None and found.export.refused is not None and found.refused


def test_layers_of_other_kinds_are_named(tmp_path: Path) -> None:
    found = _model(tmp_path, "video", (1, 1, 4, 8, 8))
    share, exits = _of(found, "basis_sharing").preview, _of(found, "early_exit").preview
    assert share is not None and exits is not None
    assert share.leaves["0"] == "a Conv3d, which is not factorized" and share.summary == "nothing can be factorized"
    assert exits.summary.startswith("no exit can sit anywhere: no module") and not exits.takes


def test_widths_that_a_target_computes_at_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 10))
    inputs = (torch.zeros(1, 8),)
    target = target_named("x86")
    assert _aligned(target, model, inputs) == pytest.approx(128 / 288)
    assert _aligned(target, nn.ReLU(), inputs) is None


def test_long_lists_are_cut_and_silence_is_named() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    preview = Preview(
        "does it", {f"layer{i}": "[bold] text" for i in range(5)}, {"a": "same", "b": "same", "c": "same"}
    )
    stages = (StageOutlook("one", "one", preview, None), StageOutlook("x", "theirs", None, None))
    export = ExportOutlook(None, {}, {"generator": True})
    show(Outlook("m", "t", 1, 2, stages, export, ("a note",), 0.1), console, 2)
    text = console.export_text()
    assert "and 3 more" in text and "[bold] text" in text and "a, b and 1 more" in text
    assert "x (theirs): this stage says nothing of itself" in text and "note: a note" in text and "a generator" in text
