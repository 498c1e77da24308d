"""Checkpoints: the same bytes every time, shared tensors once, and nothing damaged is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from stage_tester import TESTS, bits, sharing
from tiny import tiny_residual
from torch import nn

from edgewright.models.sources.module_state import copied
from edgewright.pipeline.errors import CheckpointError
from edgewright.pipeline.stage import Edit, Stage, StageConfig, StageResult
from edgewright.pipeline.store import checkpoint as checkpoint_module
from edgewright.pipeline.store.checkpoint import BaseSpec, load_checkpoint, read_checkpoint, save_checkpoint
from edgewright.pipeline.store.late_tensors import late_tensors

TINY = BaseSpec("python:tiny.py:tiny_residual")

TIED = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("none", torch.zeros(0))

    def forward(self, x):
        return self.head(torch.relu(self.embed(x)))

def net(width=6):
    return Tied(width)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, TINY, [Edit("train")], tiny_residual(3), {"a": 1.5, "b": float("nan")}, root=TESTS)
    return folder


def test_round_trip(saved: Path) -> None:
    model = load_checkpoint(saved, TESTS)
    assert bits(model) == bits(tiny_residual(3))
    assert not model.training
    data = read_checkpoint(saved)
    assert data.base == TINY and data.edits == (Edit("train"),)
    assert data.metrics == {"a": 1.5, "b": None}


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    load_checkpoint(saved, TESTS)
    assert torch.equal(torch.rand(3), expected)


def test_same_content_same_bytes_and_no_place_or_time(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "deep" / "x"
    save_checkpoint(other, TINY, [Edit("train")], tiny_residual(3), {"b": float("nan"), "a": 1.5}, root=TESTS)
    assert contents(saved) == contents(other)
    assert str(tmp_path).encode() not in contents(saved)["checkpoint.json"]
    assert str(TESTS).encode() not in contents(saved)["checkpoint.json"]


def test_saving_replaces_and_leaves_nothing_beside(saved: Path) -> None:
    save_checkpoint(saved, TINY, [], tiny_residual(4), {}, root=TESTS)
    assert bits(load_checkpoint(saved, TESTS)) == bits(tiny_residual(4))
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_a_failed_save_leaves_the_old_one(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(CheckpointError, match="no JSON"):
        save_checkpoint(saved, TINY, [Edit("train", {"x": object()})], tiny_residual(4), {}, root=TESTS)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TIED)
    base = BaseSpec("python:net.py:net", {"width": 6})
    model = checkpoint_module.registry.build(base.name, base.args, tmp_path)
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, base, [], model, {}, root=tmp_path)
    with safe_open(str(folder / "weights.safetensors"), "pt") as file:
        assert sorted(file.keys()) == ["embed.weight", "mask", "none"]
    loaded = load_checkpoint(folder, tmp_path)
    assert bits(loaded) == bits(model)
    assert sharing(loaded) == [("embed.weight", "head.weight")]


@pytest.mark.slow
def test_sharing_that_is_lost_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TIED)
    base = BaseSpec("python:net.py:net")
    save_checkpoint(
        tmp_path / "c", base, [], checkpoint_module.registry.build(base.name, {}, tmp_path), {}, root=tmp_path
    )
    (tmp_path / "net.py").write_text(TIED.replace("self.head.weight = self.embed.weight", "pass"))
    with pytest.raises(CheckpointError, match=r"'head\.weight' is not shared.*net\.py changed"):
        load_checkpoint(tmp_path / "c", tmp_path)


def test_root_comes_from_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "net.py").write_text(TIED)
    base = BaseSpec("python:net.py:net")
    model = checkpoint_module.registry.build(base.name, {}, tmp_path / "user")
    folder = tmp_path / "out" / "checkpoints" / "00-base"
    save_checkpoint(folder, base, [], model, {}, root=tmp_path / "user")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be found from .*net\.py"):
        load_checkpoint(folder)
    (tmp_path / "out" / "run.json").write_text(json.dumps({"root": str(tmp_path / "user")}))
    assert bits(load_checkpoint(folder)) == bits(model)


class TestChangedSources:
    def checkpoint(self, tmp_path: Path) -> Path:
        (tmp_path / "net.py").write_text(TIED)
        base = BaseSpec("python:net.py:net")
        model = checkpoint_module.registry.build(base.name, {}, tmp_path)
        save_checkpoint(tmp_path / "c", base, [], model, {}, root=tmp_path)
        return tmp_path / "c"

    def test_that_still_fit_are_a_warning(self, tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path)
        (tmp_path / "net.py").write_text(TIED + "\n# a comment\n")
        with pytest.warns(UserWarning, match=r"net\.py changed since"):
            load_checkpoint(folder, tmp_path)

    def test_that_do_not_fit_are_an_error(self, tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path)
        (tmp_path / "net.py").write_text(TIED.replace("width=6", "width=7"))
        with pytest.raises(
            CheckpointError,
            match=r"'embed\.weight' is float32 \[6, 6\].*wants float32 \[7, "
            r"7\]",
        ):
            load_checkpoint(folder, tmp_path)

    def test_that_are_gone_are_an_error(self, tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path)
        (tmp_path / "net.py").unlink()
        with pytest.raises(CheckpointError, match=r"net\.py"):
            load_checkpoint(folder, tmp_path)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda d: truncate(d / "weights.safetensors"), "weights.safetensors is damaged"),
        (lambda d: flip(d / "weights.safetensors"), "weights.safetensors is damaged"),
        (lambda d: truncate(d / "checkpoint.json"), "checkpoint.json is damaged"),
        (lambda d: (d / "checkpoint.json").write_bytes(b"\x00\xff"), "checkpoint.json is damaged"),
        (lambda d: (d / "checkpoint.json").write_text("[]"), "checkpoint.json is damaged"),
        (lambda d: (d / "checkpoint.json").unlink(), "is no checkpoint: it has no checkpoint.json"),
        (lambda d: shutil.rmtree(d), "is no checkpoint"),
        (lambda d: change(d, schema_version=99), "schema_version 99 and this edgewright reads 1"),
        (lambda d: change(d, base=None), "not a checkpoint of this schema"),
        (lambda d: drop(d, "edits"), "lacks 'edits'"),
        (lambda d: drop(d, "base"), "lacks 'base'"),
        (lambda d: change(d, files={}), "lacks 'files.weights.safetensors'"),
        (lambda d: change(d, files={"../../etc/passwd": "0"}), "unknown file 'passwd'"),
        (lambda d: change(d, edits=[{"stage": "tarin", "data": {}, "tensors": []}]), "unknown stage 'tarin'"),
        (lambda d: change(d, edits=[{"stage": "train", "data": {}, "tensors": ["t"]}]), "lacks '0.t'"),
        (lambda d: change(d, aliases={"x": "nothing"}), "lacks the tensor 'nothing'"),
        (lambda d: change(d, aliases={"x": "fc.weight"}), "'x' is unknown to the model"),
        (lambda d: change(d, base={"name": "zoo:nothing_like_it", "args": {}}), "unknown model"),
        (lambda d: change(d, base={"name": TINY.name, "args": {"depth": 3}}), "depth"),
    ],
)
def test_damage_is_named(saved: Path, damage: Any, wanted: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved, TESTS)
    assert wanted in str(caught.value)
    assert caught.value.exit_code == 2


def test_tensors_of_edits_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Edit] = []

    def rebuild(model: nn.Module, edit: Edit) -> nn.Module:
        seen.append(edit)
        return model

    def fit(*_: Any) -> StageResult:
        raise AssertionError

    fake = Stage("fake", StageConfig, fit, rebuild)
    monkeypatch.setattr(checkpoint_module, "stage_named", lambda name: fake)
    edits = [Edit("fake", {"keep": [1, 2]}, {"index": torch.arange(5)}), Edit("fake", {}, {"index": torch.ones(2)})]
    save_checkpoint(tmp_path / "c", TINY, edits, tiny_residual(), {}, root=TESTS)
    load_checkpoint(tmp_path / "c", TESTS)
    assert [dict(edit.data) for edit in seen] == [{"keep": [1, 2]}, {}]
    assert torch.equal(seen[0].tensors["index"], torch.arange(5))
    assert torch.equal(seen[1].tensors["index"], torch.ones(2))


def test_extra_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(CheckpointError, match="only tensors can be stored without pickle"):
        save_checkpoint(tmp_path / "c", TINY, [], Odd(2, 2), {}, root=TESTS)
    assert not (tmp_path / "c").exists()


def test_half_precision_does_not_come_back_as_float32(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", TINY, [], tiny_residual().to(torch.bfloat16), {}, root=TESTS)
    with pytest.raises(CheckpointError, match=r"bfloat16.*wants float32"):
        load_checkpoint(tmp_path / "c", TESTS)


def test_no_pickle_in_the_sources() -> None:
    folder = Path(checkpoint_module.__file__).parent
    texts = {path.name: path.read_text() for path in folder.rglob("*.py")}
    assert not [name for name, text in texts.items() if "import pickle" in text or "torch.load(" in text]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def change(folder: Path, **values: Any) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop(folder: Path, key: str) -> None:
    path = folder / "checkpoint.json"
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("network", ["InBuffer", "InEmptyBuffer", "InParameter", "InAttribute", "WeightNorm"])
def test_what_a_first_call_made_comes_back(tmp_path: Path, network: str) -> None:
    base = BaseSpec(f"python:first_call.py:{network}")
    fresh = checkpoint_module.registry.build(base.name, {}, TESTS).eval()
    model, x = copied(fresh), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x)
        checkpoint_module.write_checkpoint(tmp_path, base, [], model, {}, TESTS, late=late_tensors(model, fresh))
        assert torch.equal(load_checkpoint(tmp_path, TESTS)(x), wanted)


def test_a_late_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    late = {"nowhere.mask": {"kind": "buffer", "shape": [1], "dtype": "float32"}}
    save_checkpoint(tmp_path / "c", TINY, [], tiny_residual(4), {}, root=TESTS)
    change(tmp_path / "c", late=late)
    with pytest.raises(CheckpointError, match=r"nowhere\.mask.*has no place"):
        load_checkpoint(tmp_path / "c", TESTS)
