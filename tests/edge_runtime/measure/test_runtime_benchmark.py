from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import (
    Contender,
    EdgewrightError,
    InputError,
    ProviderError,
    bench,
    bench_text,
    interleaved,
    pack_zip,
)
from edgewright.edge_runtime.measure import child as child_module
from edgewright.edge_runtime.measure.benchmark import latency_figures
from edgewright.edge_runtime.measure.measuring import WINDOW, read_feeds, warm_up, write_feeds

QUICK = {"min_seconds": 0.05, "min_samples": 70, "threads": 1}


def test_a_row(bundle: Path, tmp_path: Path) -> None:
    row = bench(bundle, **QUICK)
    assert row["status"] == "ok" and row["schema_version"] == 1 and row["boundary"] == "host"
    assert row["scenario"]["n"] == len(row["samples_ns"]) == len(row["sample_exits"]) >= 70
    assert row["scenario"]["distinct_inputs"] == 12
    assert row["scenario"]["warmup"]["runs"] >= 10 and isinstance(row["scenario"]["warmup"]["settled"], bool)
    assert set(row["phases_ms"]) == {"import", "create", "first_run"}
    assert row["ep"]["requested"] == row["ep"]["session"] == ["CPUExecutionProvider"]
    assert row["session"]["intra"] == 1 and row["session"]["operating_point"] == "default"
    assert row["verdict"]["verdict"] in ("stable", "noisy", "drifting")
    assert row["artefact"]["if_count"] == 1 and len(row["artefact"]["sha256"]) == 64
    assert row["device"]["fingerprint"] and all(isinstance(sample, int) for sample in row["samples_ns"])
    latency = row["latency_ms"]
    assert latency["p50_ci95"][0] <= latency["p50"] <= latency["p50_ci95"][1]
    assert latency["p90"] <= latency["p90_bound99"]
    text = bench_text(row)
    assert "p50" in text and "exit 2" in text and len(text.splitlines()) < 25
    assert row.text() == text == bench_text(json.loads(row.to_json())), "a row that was read back"
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False)) == row.to_dict() == {f: row[f] for f in row.to_dict()}
    with pytest.raises(KeyError):
        row["latency"]


def test_the_json_of_a_row_has_the_fields_that_its_readers_know(flat_bundle: Path) -> None:
    found = bench(flat_bundle, min_seconds=0, min_samples=1, threads=1).to_dict()
    assert list(found) == [
        *("schema_version", "run_id", "status", "artefact", "target_profile", "ep", "session", "boundary", "scenario"),
        *("latency_ms", "verdict", "phases_ms", "memory", "exits", "energy", "accuracy", "parity", "device", "reasons"),
        *("samples_file", "samples_ns", "sample_exits"),
    ]
    assert list(found["ep"]) == ["requested", "session", "nodes_per_ep", "strict", "fallback", "method"]
    assert found["session"] == {
        "graph_opt_level": "all",
        "intra": 1,
        "inter": 1,
        "io_binding": False,
        "cuda_graph": False,
        "thresholds": [],
        "operating_point": None,
        "layout": "file",
    }


def _nulls(value: object, path: str = "") -> list[str]:
    if value is None:
        return [path]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _nulls(item, f"{path}.{key}".lstrip("."))]
    return []


def test_every_null_has_a_reason(bundle: Path, flat_bundle: Path) -> None:
    for path in (bundle, flat_bundle):
        row = bench(path, min_seconds=0, min_samples=20)
        for null in _nulls(row.to_dict()):
            covered = null.startswith(("device.facts.", "verdict.")) or null.removesuffix("_bound99") in row["reasons"]
            assert covered or null in ("sample_exits", "session.operating_point"), null
        assert row["reasons"]["latency_ms.p99"].endswith("662 are needed")
        assert "latency_ms.p90" in row["reasons"]


def test_every_exit_has_its_share_and_latency(bundle: Path) -> None:
    row = bench(bundle, **QUICK)
    exits = row["exits"]
    assert sum(exits["n"]) == row["scenario"]["n"] and sum(exits["p_exit"]) == pytest.approx(1)
    assert all(n > 0 for n in exits["n"]) and None not in exits["latency_ms_per_exit"]
    deep = bench(bundle, operating_point="deep", **QUICK)
    assert deep["exits"]["p_exit"] == [0, 0, 1] and deep["exits"]["latency_ms_per_exit"][0] is None
    assert deep["session"]["thresholds"] == [2, 2] and deep["session"]["operating_point"] == "deep"


def test_a_percentile_that_is_asked_for_is_there(flat_bundle: Path) -> None:
    row = bench(flat_bundle, percentiles=[99], min_seconds=0, threads=1)
    assert row["scenario"]["n"] >= 662 and row["latency_ms"]["p99_bound99"] is not None
    with pytest.raises(InputError, match="between 0 and 100"):
        bench(flat_bundle, percentiles=[100])


def test_samples_go_to_a_file(bundle: Path, tmp_path: Path) -> None:
    row = bench(bundle, samples_file=tmp_path / "s.npy", **QUICK)
    samples = np.load(tmp_path / "s.npy")
    assert samples.dtype == np.int64 and len(samples) == row["scenario"]["n"]
    assert row["samples_ns"] is None and row["samples_file"] == "s.npy"
    with pytest.raises(InputError, match="cannot write the samples"):
        bench(bundle, samples_file=tmp_path / "no" / "s.npy", **QUICK)


def test_inputs_of_the_user(bundle: Path, flat_bundle: Path, tmp_path: Path, rows: np.ndarray) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    row = bench(bundle, inputs=tmp_path / "images.npy", **QUICK)
    assert row["scenario"]["distinct_inputs"] == 4 and row["scenario"]["inputs"] == "images.npy"
    np.savez_compressed(tmp_path / "rows.npz", x=rows)
    pack_zip(flat_bundle, tmp_path / "flat.zip")
    row = bench(tmp_path / "flat.zip", inputs=tmp_path / "rows.npz", rows=2, **QUICK)
    assert row["scenario"]["distinct_inputs"] == 1 and row["scenario"]["rows_per_run"] == 2
    assert row["exits"] is None and row["reasons"]["exits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": np.zeros((2, 3, 6, 6), np.float32)}, "every input is zero"),
        ({"inputs": np.ones((2, 3, 6, 7), np.float32)}, "wanted float32"),
        ({"inputs": "missing.npy"}, "no input at"),
        ({"rows": 2}, "takes one row a run"),
        ({"thresholds": [1]}, "has 2 thresholds"),
        ({"providers": ["gpu9"]}, "unknown execution provider"),
        ({"optimization_level": "most"}, "unknown optimization level"),
        ({"threads": -1}, "a number from 1 to"),
    ],
)
def test_bad_options(bundle: Path, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(bundle, **{"min_seconds": 0, **options})


def test_pickled_inputs_are_refused(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(InputError, match="pickled Python objects"):
        bench(bundle, inputs=tmp_path / "o.npy")


@pytest.mark.parametrize("options", [{"min_seconds": float("nan")}, {"min_seconds": float("inf")}, {"min_samples": 0}])
def test_measurements_that_would_never_end_or_begin_are_refused(bundle: Path, options) -> None:
    with pytest.raises(InputError, match="min_seconds is finite and min_samples positive"):
        bench(bundle, **options)


def test_inputs_that_have_no_answer_are_not_measured(bundle: Path, rows: np.ndarray) -> None:
    rows[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="input 'x', row 2: nan"):
        bench(bundle, inputs=rows)


def test_an_error_in_the_child_is_the_same_error_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderError, match="QNNExecutionProvider was asked for"):
        bench(bundle, providers=["QNNExecutionProvider"])


def test_a_crash_is_a_result(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(child_module, "child_command", lambda spec: [sys.executable, "-c", code])
    row = bench(bundle, **QUICK)
    assert row["status"] == "crashed" and row["latency_ms"] is None
    assert "SIGABRT" in row["reasons"]["status"] and "last words" in row["reasons"]["status"]
    assert "CRASHED" in bench_text(row)
    json.dumps(row.to_dict(), allow_nan=False)
    with pytest.raises(EdgewrightError, match="crashed"):
        interleaved({"a": bundle})


def test_a_hang_is_a_result(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(60)"
    monkeypatch.setattr(child_module, "child_command", lambda spec: [sys.executable, "-c", code])
    row = bench(bundle, timeout_s=0.3, **QUICK)
    assert row["status"] == "timeout" and "stopped after 0.3 s" in row["reasons"]["status"]


def test_the_child_ignores_what_lies_in_the_working_folder(
    flat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "onnxruntime", "json", "models"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert bench(flat_bundle, **QUICK)["status"] == "ok"


class _Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def runs(self, latencies_ms):
        """A run_once that takes as long as `latencies_ms` says, by run number."""
        count = iter(range(10**9))

        def run_once(index: int) -> int:
            elapsed = int(latencies_ms(next(count), index) * 1e6)
            self.now += elapsed
            return elapsed

        return run_once


def test_warm_up_waits_until_it_has_settled() -> None:
    clock = _Clock()
    result = warm_up(clock.runs(lambda n, i: 10 + 40 * 0.97**n), clock=clock)
    assert result.settled and result.runs > 100


def test_warm_up_of_a_mix_of_exits_settles() -> None:
    clock = _Clock()
    result = warm_up(clock.runs(lambda n, i: 5 if i % 3 else 50), clock=clock)
    assert result.settled and result.runs <= 60 + 2 * WINDOW


def test_warm_up_gives_up_and_says_so() -> None:
    clock = _Clock()
    result = warm_up(clock.runs(lambda n, i: 10 * 1.01**n), clock=clock, max_seconds=10)
    assert not result.settled and result.seconds >= 10
    clock = _Clock()
    slow = warm_up(clock.runs(lambda n, i: 30_000), clock=clock, max_seconds=10)
    assert not slow.settled and slow.runs == 1


def test_figures_of_few_samples() -> None:
    figures, reasons = latency_figures(np.array([1_000_000, 3_000_000]))
    assert figures["p50"] == 2.0 and figures["p90"] is None and figures["p50_bound99"] is None
    assert reasons["p90"] == "2 samples cannot carry p90: 64 are needed"


def test_feeds_round_trip_in_order(tmp_path: Path) -> None:
    feeds = [{"x": np.full((1, 2), i, np.float32), "a/b": np.array([i])} for i in range(12)]
    write_feeds(tmp_path / "f.npz", feeds)
    read = read_feeds(tmp_path / "f.npz")
    assert [int(feed["a/b"][0]) for feed in read] == list(range(12)) and set(read[0]) == {"x", "a/b"}


OPTIONS = {"blocks": 12, "block_runs": 4, "warmup_seconds": 0.2, "threads": 1}


class TestInterleaved:
    def test_bundles_and_bare_models_side_by_side(
        self, bundle: Path, flat_bundle: Path, tmp_path: Path, rows: np.ndarray
    ) -> None:
        np.savez(tmp_path / "rows.npz", x=rows)
        result = interleaved(
            {
                "exits": bundle,
                "forced": Contender(bundle, thresholds=[2, 2]),
                "bare": Contender(bundle / "model.onnx", thresholds=[0, 0]),
                "flat": flat_bundle,
            },
            inputs=tmp_path / "rows.npz",
            baseline="flat",
            **OPTIONS,
        )
        assert set(result.ratios) == {"exits", "forced", "bare"} and result.baseline == "flat"
        for name, samples in result.samples_ns.items():
            assert samples.shape == (12, 4) and samples.dtype == np.int64 and (samples > 0).all(), name
        assert (result.exits["forced"] == 2).all() and (result.exits["bare"] == 0).all()
        assert (result.exits["flat"] == -1).all()
        ratio = result.ratios["forced"]
        assert ratio.low <= ratio.value <= ratio.high and ratio.pairs == 12
        assert result.latency_ms("bare")["p50"] > 0
        assert len(result.text().splitlines()) == 4
        data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert data["ratios"]["bare"]["pairs"] == 12

    def test_every_block_gives_all_artefacts_the_same_inputs(self, bundle: Path) -> None:
        result = interleaved({"a": bundle, "b": bundle}, statistic="mean", **OPTIONS)
        assert np.array_equal(result.exits["a"], result.exits["b"])
        assert len({tuple(block) for block in result.exits["a"].tolist()}) > 1

    @pytest.mark.parametrize(
        ("contenders", "options", "message"),
        [
            ({}, {}, "nothing to measure"),
            ({"a": "bundle"}, {"baseline": "b"}, "none of a"),
            ({"a": "bundle"}, {"statistic": "max"}, "use median or mean"),
            ({"a": "bundle"}, {"blocks": 0}, "numbers from 1 to"),
            ({"a": "bundle/model.onnx"}, {}, "is a bare model: give its inputs"),
            ({"a": "bundle"}, {"thresholds": [0, 0]}, "give them to its Contender"),
            ({"a": "bundle"}, {"layout": "split"}, "give them to its Contender"),
        ],
    )
    def test_bad_options(self, bundle: Path, contenders, options, message: str) -> None:
        sides = {name: bundle.parent / path for name, path in contenders.items()}
        with pytest.raises(InputError, match=message):
            interleaved(sides, **options)
