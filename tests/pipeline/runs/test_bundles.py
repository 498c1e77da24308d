"""Bundles of a run: none that changed counts as current, and a step's mean MACs are those of the exported graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgewright.edge_runtime.bundle.manifest import Manifest
from edgewright.export.options import ExportOptions
from edgewright.pipeline.report.steps import StepRow
from edgewright.pipeline.runs import bundles
from edgewright.pipeline.store.cache import Key

KEY = Key({"x": 1})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "inner").mkdir(parents=True)
    for name in ("model.onnx", "manifest.json", "golden.npz", "inner/level.onnx"):
        (folder / name).write_bytes(b"some bytes of " + name.encode())
    (tmp_path / "bundle.zip").write_bytes(b"zip")
    bundles.record(folder, KEY, ExportOptions(zip=True))
    return folder


def test_a_recorded_bundle_is_current_under_its_key_only(bundle: Path) -> None:
    assert bundles.is_current(bundle, KEY)
    assert not bundles.is_current(bundle, Key({"x": 2}))


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "golden.npz", "inner/level.onnx", "../bundle.zip"])
@pytest.mark.parametrize("change", ["byte", "gone"])
def test_a_file_that_changed_by_one_byte_or_is_gone_makes_it_anew(bundle: Path, name: str, change: str) -> None:
    file = bundle / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if change == "byte":
        file.write_bytes(content)
    else:
        file.unlink()
    assert not bundles.is_current(bundle, KEY)


def test_a_file_more_and_a_missing_record_make_it_anew(bundle: Path) -> None:
    (bundle / "extra").write_bytes(b"")
    assert not bundles.is_current(bundle, KEY)
    (bundle / "extra").unlink()
    assert bundles.is_current(bundle, KEY)
    bundle.with_name("bundle.key.json").unlink()
    assert not bundles.is_current(bundle, KEY)


def _exported(bundle: Path, *ways: tuple[int, int]) -> bundles.Exported:
    exits = [SimpleNamespace(macs=macs, attention_macs=attention) for macs, attention in ways]
    return bundles.Exported(bundle, cast("Manifest", SimpleNamespace(exits=exits)))


def test_the_macs_are_those_of_the_graph(bundle: Path) -> None:
    values: dict[str, Any] = dict.fromkeys(StepRow.__dataclass_fields__)
    # PyTorch's operators counted something else, on the way to every exit
    values |= {
        "step": "exits",
        "stage": "early_exit",
        "macs": 7777.0,
        "attention_macs": 77.0,
        "notes": (),
        "metrics": {},
    }
    row = bundles.with_bundle(
        StepRow(**values | {"exit_shares": (0.75, 0.25)}), _exported(bundle, (100, 10), (1000, 50))
    )
    assert row.macs == 0.75 * 100 + 0.25 * 1000 and row.attention_macs == 0.75 * 10 + 0.25 * 50
    assert row.file_bytes == (bundle / "model.onnx").stat().st_size
    assert "1000 MACs" in row.notes[0] and "7777" in row.notes[0]
    assert row.macs_of == "graph"
    plain = bundles.with_bundle(StepRow(**values | {"exit_shares": ()}), _exported(bundle, (1000, 50)))
    assert (plain.macs, plain.attention_macs, plain.macs_of) == (1000.0, 50.0, "graph")
    assert "7777" in plain.notes[0]
