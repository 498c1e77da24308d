"""The cache: every input is part of the key, a miss can be explained, nothing half-written is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_tester import TESTS
from tiny import tiny_residual

from edgewright.pipeline import sources
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.sources import file_digests, module_digests
from edgewright.pipeline.stage import Edit
from edgewright.pipeline.stages.train import TrainConfig
from edgewright.pipeline.store.atomic import canonical_json, new_folder, plain, pretty_json, write_text
from edgewright.pipeline.store.cache import BASE, Cache, Entry, Key, base_key, environment, stage_key
from edgewright.pipeline.store.checkpoint import BaseSpec

TINY = BaseSpec("python:tiny.py:tiny_residual")
AROUND: dict[str, Any] = {"versions": {"torch": "2.0"}, "threads": 1, "device": "cpu"}
GIVEN = Key({"x": 1})


def train_key(**changes: Any) -> Key:
    values: dict[str, Any] = {
        "stage": "train",
        "config": TrainConfig(),
        "position": 1,
        "given": GIVEN,
        "seed": 0,
        "environment": AROUND,
        **changes,
    }
    return stage_key(**values)


def model_key(**changes: Any) -> Key:
    values: dict[str, Any] = {
        "base": TINY,
        "base_sources": {"net.py": "aa"},
        "weights": None,
        "task": BaseSpec("some_task"),
        "task_sources": {"data.py": "bb"},
        "data": {"train": "cc"},
        "seed": 0,
        "environment": AROUND,
        **changes,
    }
    return base_key(**values)


STAGE_CHANGES = {
    "config": {"config": TrainConfig(epochs=11)},
    "position": {"position": 2},
    "input": {"given": Key({"x": 2})},
    "seed": {"seed": 1},
    "threads": {"environment": {**AROUND, "threads": 2}},
    "device": {"environment": {**AROUND, "device": "cuda"}},
    "versions": {"environment": {**AROUND, "versions": {"torch": "2.1"}}},
}
BASE_CHANGES = {
    "model": {"base": BaseSpec(TINY.name, {"seed": 1})},
    "model_sources": {"base_sources": {"net.py": "ab"}},
    "weights": {"weights": "dd"},
    "task": {"task": BaseSpec("some_task", {"size": 1})},
    "task_sources": {"task_sources": {"data.py": "bc"}},
    "data": {"data": {"train": "cd"}},
    "seed": {"seed": 1},
    "environment": {"environment": {**AROUND, "threads": 2}},
}


@pytest.mark.parametrize("part", STAGE_CHANGES)
def test_every_part_changes_a_stage_key(part: str) -> None:
    assert train_key(**STAGE_CHANGES[part]).digest != train_key().digest


@pytest.mark.parametrize("part", BASE_CHANGES)
def test_every_part_changes_the_base_key(part: str) -> None:
    assert model_key(**BASE_CHANGES[part]).digest != model_key().digest


def test_equal_parts_give_equal_keys() -> None:
    assert train_key().digest == train_key().digest
    assert model_key(base=BaseSpec("a", {"x": 1, "y": 2})) == model_key(base=BaseSpec("a", {"y": 2, "x": 1}))


def test_a_changed_source_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = train_key()
    real = sources.module_digests
    changed = {**real("edgewright.pipeline.stages.train"), "edgewright.pipeline.training.training": "0" * 64}
    monkeypatch.setattr("edgewright.pipeline.store.cache.module_digests", lambda name: changed)
    assert train_key().digest != before.digest


def test_environment_names_what_results_depend_on() -> None:
    found = environment(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads() and found["device"] == "cpu"
    used = {"python", "torch", "torchvision", "numpy"}
    assert used <= set(found["versions"]) <= used | {"timm", "transformers"}, "those that are installed"
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


class TestModuleDigests:
    def test_follow_imports_and_leave_the_rest_out(self) -> None:
        found = module_digests("edgewright.pipeline.stages.train")
        assert {
            "edgewright.pipeline.stages.train",
            "edgewright.pipeline.training.training",
            "edgewright.pipeline.task",
            "edgewright.pipeline.errors",
            "edgewright.edge_runtime.bundle.manifest",
            "edgewright.edge_runtime.errors",
        } <= set(found)
        outside = {"runner", "cli", "report", "recipe", "cache"}
        assert not {f"edgewright.pipeline.{name}" for name in outside} & set(found)
        assert all(len(digest) == 64 for digest in found.values())

    def test_a_package_counts_with_all_its_modules(self) -> None:
        found = module_digests("edgewright.models.layers")
        assert {f"edgewright.models.layers.{n}" for n in ("factorized", "multi_exit", "exit_policies")} <= set(found)

    def test_imports_in_functions_relative_ones_and_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = """
from typing import TYPE_CHECKING
from . import beside
from .. import above as renamed
from ..pack.deep import thing
import edgewright.export.whole
if TYPE_CHECKING:
    from .unseen import X
else:
    from .seen import X
def f():
    from .lazy import y
    import_module("edgewright.export.named")
    import numpy, json
"""
        known = {"edgewright.a.b.beside", "edgewright.a.above"}
        monkeypatch.setattr(sources, "_file_of", lambda name: Path() if name in known else None)
        found = set(sources._imports(sources.ast.parse(text), "edgewright.a.b"))
        assert found == {
            "edgewright.a.b.beside",
            "edgewright.a.above",
            "edgewright.a.pack.deep",
            "edgewright.export.whole",
            "edgewright.a.b.seen",
            "edgewright.a.b.lazy",
            "edgewright.export.named",
        }


def test_file_digests_have_portable_names(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name / "pkg").mkdir(parents=True)
        (tmp_path / name / "pkg" / "net.py").write_text("x = 1")
    here = file_digests([tmp_path / "here" / "pkg" / "net.py"], tmp_path / "here")
    assert here == file_digests([tmp_path / "there" / "pkg" / "net.py"], tmp_path / "there")
    assert list(here) == ["pkg/net.py"]
    assert list(file_digests([tmp_path / "here" / "pkg" / "net.py"], tmp_path / "there")) == ["pkg/net.py"]


class TestEntries:
    def store(self, out: Path, key: Key, position: int = 1, **changes: Any) -> Entry:
        values: dict[str, Any] = {
            "metrics": {"log": [1.0], "bad": float("inf")},
            "notes": ("a note",),
            "artifacts": {"scores": torch.arange(3)},
            **changes,
        }
        return Cache(out).store(position, "train", key, TINY, TESTS, [Edit("train")], tiny_residual(), **values)

    def test_found_again_with_everything(self, tmp_path: Path) -> None:
        stored = self.store(tmp_path, train_key())
        found = Cache(tmp_path).find(1, "train", train_key())
        assert found == stored and found is not None
        assert stored.folder.name == f"01-train-{train_key().short}"
        assert found.metrics == {"log": [1.0], "bad": None} and found.notes == ("a note",)
        assert found.artifacts()["scores"].tolist() == [0, 1, 2]

    def test_same_bytes_in_two_places(self, tmp_path: Path) -> None:
        one, two = self.store(tmp_path / "a", train_key()), self.store(tmp_path / "b", train_key())
        assert {p.name: p.read_bytes() for p in one.folder.iterdir()} == {
            p.name: p.read_bytes() for p in two.folder.iterdir()
        }

    def test_other_key_position_or_stage_is_not_found(self, tmp_path: Path) -> None:
        self.store(tmp_path, train_key())
        cache = Cache(tmp_path)
        assert cache.find(1, "train", train_key(seed=1)) is None
        assert cache.find(2, "train", train_key()) is None
        assert cache.find(1, BASE, train_key()) is None

    def test_storing_drops_the_unfinished_state(self, tmp_path: Path) -> None:
        state = Cache(tmp_path).state(train_key())
        state.mkdir(parents=True)
        (state / "x").write_text("x")
        self.store(tmp_path, train_key())
        assert not state.exists()

    @pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.json", "result.json", "artifacts.npz"])
    @pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
    def test_damaged_entries_are_not_taken(self, tmp_path: Path, name: str, damage: str) -> None:
        path = self.store(tmp_path, train_key()).folder / name
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-9] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
        cache = Cache(tmp_path)
        assert cache.find(1, "train", train_key()) is None
        assert cache.why_missed(1, "train", train_key()) == f"{path} is damaged"

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": "x", "files": 3}'])
    def test_damaged_key_files_are_not_taken(self, tmp_path: Path, content: str) -> None:
        (self.store(tmp_path, train_key()).folder / "key.json").write_text(content)
        assert Cache(tmp_path).find(1, "train", train_key()) is None

    def test_half_written_entries_are_not_taken_and_go(self, tmp_path: Path) -> None:
        folder = self.store(tmp_path, train_key()).folder
        half = folder.with_name(f".{folder.name}.4711.part")
        folder.rename(half)
        cache = Cache(tmp_path)
        assert cache.find(1, "train", train_key()) is None
        assert not half.exists()

    def test_metrics_that_are_no_json_name_the_stage(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match="train: a metric is no JSON"):
            self.store(tmp_path, train_key(), metrics={"x": object()})

    def test_misses_are_explained(self, tmp_path: Path) -> None:
        assert Cache(tmp_path).why_missed(1, "train", train_key()) is None
        self.store(tmp_path, train_key())
        self.store(tmp_path, train_key(config=TrainConfig(epochs=99, momentum=0.1), seed=4))
        cache = Cache(tmp_path)
        expected = {
            "config": "config.epochs: 10 -> 11",
            "input": "its input changed",
            "seed": "seed: 0 -> 1",
            "threads": "threads: 1 -> 2",
            "versions": 'versions.torch: "2.0" -> "2.1"',
        }
        for part, text in expected.items():
            assert cache.why_missed(1, "train", train_key(**STAGE_CHANGES[part])) == text
        both = train_key(config=TrainConfig(epochs=11), given=Key({}))
        assert cache.why_missed(1, "train", both) == "config.epochs: 10 -> 11, its input changed"

    def test_changed_sources_and_data_are_named(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        cache.store(0, BASE, model_key(), TINY, TESTS, [], tiny_residual(), {})
        for part, text in {
            "model_sources": "model_sources.net.py changed",
            "task_sources": "task_sources.data.py changed",
            "data": "data.train changed",
            "weights": "model.weights changed",
        }.items():
            assert cache.why_missed(0, BASE, model_key(**BASE_CHANGES[part])) == text


class TestAtomic:
    def test_a_folder_appears_whole_or_not_at_all(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        with pytest.raises(RuntimeError), new_folder(target) as aside:
            (aside / "a").write_text("a")
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []
        with new_folder(target) as aside:
            (aside / "a").write_text("a")
            assert not target.exists()
        with new_folder(target) as aside:
            (aside / "b").write_text("b")
            assert (target / "a").exists()
        assert [path.name for path in target.iterdir()] == ["b"]
        assert list(tmp_path.iterdir()) == [target]

    def test_text_replaces(self, tmp_path: Path) -> None:
        write_text(tmp_path / "deep" / "x", "one")
        write_text(tmp_path / "deep" / "x", "two")
        assert [p.read_text() for p in (tmp_path / "deep").iterdir()] == ["two"]

    def test_plain(self) -> None:
        value = {"p": Path("a/b"), "t": (1, 2.5), "s": {"y", "x"}, "n": torch.ones(2), 3: None, "i": float("inf")}
        assert plain(value, finite=True) == {
            "p": "a/b", "t": [1, 2.5], "s": ["x", "y"], "n": [1.0, 1.0], "3": None, "i": None,
        }  # fmt: skip
        assert json.loads(pretty_json(value))["i"] == float("inf")
        assert canonical_json({"b": 1, "a": [True]}) == '{"a":[true],"b":1}'
        with pytest.raises(TypeError, match="object cannot be written as JSON"):
            plain({"x": [object()]})
