"""The split layout: the levels as chained files give what PyTorch and the one file give."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported import share_conv_bases, with_exits
from sequences import sequence_model
from tiny import CLASSES

from edgewright.edge_runtime import (
    SessionOptions,
    latency_table,
    load,
    open_bundle,
    record_latency,
    session_on,
    verify,
    write_manifest,
)
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import OperatingPoint
from edgewright.edge_runtime.errors import BundleError, InputError, ParityError
from edgewright.edge_runtime.inference.session import bundle_session
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.edge_runtime.measure.exit_latency import latency_table_text
from edgewright.export import ExportOptions, export_bundle
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.split_files import prove_split
from edgewright.export.exits.split_levels import split_levels
from edgewright.export.graph.capture import capture


@pytest.fixture(scope="module")
def exported(task, tmp_path_factory):
    """A model and its bundle with both layouts, for any number of rows, with a second operating point."""
    model, path = with_exits("residual"), tmp_path_factory.mktemp("split") / "b"
    points = [OperatingPoint("stored", tuple(model.thresholds.tolist())), OperatingPoint("all_at_once", (1.0, 0.0))]
    export_bundle(model, task, path, ExportOptions(batch="compact", split=True), operating_points=points)
    return model, path


def same(got, want, rows):
    np.testing.assert_array_equal(got["exit_index"], want.exit_index[:rows])
    np.testing.assert_array_equal(got["label"], want.label[:rows])
    np.testing.assert_allclose(got["scores"], want.scores[:rows], atol=1e-5)


@pytest.mark.slow
def test_both_layouts_answer_alike_by_every_exit_and_for_every_batch(exported):
    model, path = exported
    for level in ("disabled", "all"):
        report = verify(path, layout="split", optimization_level=level)
        assert report.passed and report.exits_covered == 3 and report.layout == "split"
    x = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model.all_logits(x)
    seen, mixed = set(), 0
    for thresholds in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.9, 0.9]):
        want = model.decide(logits, torch.tensor(thresholds))
        seen |= set(want.exit_index.tolist())
        mixed += len(want.exit_index.unique()) == 3
        with (
            load(path, layout="split", thresholds=thresholds, threads=1) as split,
            load(path, thresholds=thresholds, threads=1) as one,
        ):
            for rows in (0, 1, 7, 32):
                got = split.run({"image": x[:rows].numpy()})
                same(got, want, rows)
                assert [v.dtype for v in got.values()] == [np.int64, np.float32, np.int64]
                for name, value in one.run({"image": x[:rows].numpy()}).items():
                    np.testing.assert_allclose(got[name], value, atol=1e-5)
    assert seen == {0, 1, 2} and mixed, "every exit, and one batch whose rows leave at all of them"


@pytest.mark.slow
def test_a_compact_bundle_is_verified_and_takes_no_rows_too(exported):
    _, path = exported
    report = verify(path)
    assert report.passed and report.layout == "file"
    with load(path) as runner:
        manifest = runner.manifest
        assert manifest.batch == "compact" and manifest.inputs[0].shape == ("batch", 1, 12, 12)
        assert manifest.parity.exits_covered == manifest.parity.exits_total == 3
        x = torch.randn(9, 1, 12, 12).numpy()
        assert len(runner.predict(x).label) == 9
        for rows in (0, 1, 9):
            got = runner.run({"image": x[:rows]})
            assert got["label"].shape == got["exit_index"].shape == (rows,) and got["scores"].shape == (rows, CLASSES)


def test_the_files_are_hashed_and_each_stores_only_what_it_reads(exported):
    _, path = exported
    with open_bundle(path) as bundle:
        manifest = bundle.manifest
        files = manifest.split.files
        assert files == ("split/level0.onnx", "split/level1.onnx", "split/level2.onnx")
        assert set(files) <= set(manifest.files)
        models = [ir.load(bundle.path(name)) for name in files]
    assert manifest.split.unique_weight_bytes <= manifest.ledger.unique_weight_bytes
    for model in models:
        read = {v for node in model.graph.all_nodes() for v in node.inputs}
        assert all(value in read for value in model.graph.initializers.values())
        assert "If" not in {node.op_type for node in model.graph}
    altered = path / files[1]
    content = altered.read_bytes()
    altered.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"split/level1\.onnx has"):
        open_bundle(path)
    altered.write_bytes(content)


@pytest.mark.slow
def test_one_row_a_run_and_a_shared_basis_that_is_once_in_each_file_that_reads_it(tmp_path):
    model = share_conv_bases(with_exits("residual"))
    x = torch.randn(1, 1, 12, 12)
    flat = capture(model, (x,), ["image"])
    policy = policy_graphs(model.policy.name, CLASSES, flat.graph.opset_imports[""])
    levels = split_levels(flat, policy, [0.5, 0.5], [{"image": x.numpy()}])
    assert levels.row_axes == {}
    names = [name for level in levels.models for name in level.graph.initializers if name.endswith("basis.weight")]
    assert len(set(names)) == 1 and 1 < len(names) <= 3
    assert all(isinstance(size, int) for level in levels.models for v in level.graph.inputs for size in v.shape)
    for k, level in enumerate(levels.models):
        ir.save(level, tmp_path / f"{k}.onnx")
    chain = SplitSession([session_on(tmp_path / f"{k}.onnx").session for k in range(3)], ["image"], {})
    for thresholds in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]):
        with torch.no_grad():
            want = model.decide(model.all_logits(x), torch.tensor(thresholds))
        given = {"image": x.numpy(), "thresholds": np.asarray(thresholds, np.float32)}
        same(dict(zip(("label", "scores", "exit_index"), chain.run(None, given), strict=True)), want, 1)


@pytest.mark.slow
def test_rows_leave_along_their_own_axis_and_sizes_follow(tmp_path):
    model = sequence_model()
    flat = capture(model, (torch.randn(2, 5, 6),), ["image"], [{0: "batch"}])
    policy = policy_graphs(model.policy.name, CLASSES, flat.graph.opset_imports[""], any_rows=True)
    feeds = [{"image": np.zeros((rows, 5, 6), np.float32)} for rows in (2, 3)]
    levels = split_levels(flat, policy, [0.85], feeds)
    assert set(levels.row_axes.values()) == {0, 1}, "the stream has its rows in axis 1"
    for k, level in enumerate(levels.models):
        ir.save(level, tmp_path / f"{k}.onnx")
    x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(1))
    for threshold in (0.0, 0.8, 0.9, 1.0):
        with torch.no_grad():
            want = model.decide(model.all_logits(x), torch.tensor([threshold]))
        first = session_on(tmp_path / "0.onnx", thresholds=[threshold]).session
        chain = SplitSession([first, session_on(tmp_path / "1.onnx").session], ["image"], levels.row_axes)
        label, exit_index = chain.run(["label", "exit_index"], {"image": x.numpy()})
        np.testing.assert_array_equal(exit_index, want.exit_index)
        np.testing.assert_array_equal(label, want.label)


def test_a_row_of_nan_is_reported_and_disturbs_no_other(exported):
    _, path = exported
    x = np.random.default_rng(0).standard_normal((6, 1, 12, 12)).astype(np.float32)
    with load(path, layout="split") as runner:
        want = runner.run({"image": x})
        spoiled = x.copy()
        spoiled[2] = np.nan
        got = runner.run({"image": spoiled})
    others = [0, 1, 3, 4, 5]
    assert np.isnan(got["scores"][2]).all()
    np.testing.assert_array_equal(got["exit_index"][others], want["exit_index"][others])
    np.testing.assert_allclose(got["scores"][others], want["scores"][others], atol=1e-6)


def test_operating_points_switch_the_split_layout_too(exported):
    _, path = exported
    x = np.random.default_rng(0).standard_normal((4, 1, 12, 12)).astype(np.float32)
    with load(path, layout="split", operating_point="all_at_once") as runner:
        assert runner.thresholds == (1.0, 0.0)
        assert (runner.predict(x).exit_index == 0).all()
    assert verify(path, layout="split", operating_point="all_at_once").cases > 0, "every point is recorded"
    with pytest.raises(InputError, match=r"did you mean 'stored'\? the bundle has stored, all_at_once"):
        load(path, layout="split", operating_point="stord")
    with pytest.raises(InputError, match="2 thresholds, got 1"):
        load(path, layout="split", thresholds=[0.5])
    with pytest.raises(InputError, match=r"nothing was recorded .* \(stored, all_at_once\)"):
        verify(path, thresholds=[0.5, 0.25])
    with pytest.raises(InputError, match="unknown layout 'chain': use file or split"):
        load(path, layout="chain")


@pytest.mark.slow
def test_the_latency_table_says_for_every_exit_what_a_row_costs_and_which_layout_is_faster(exported, tmp_path):
    _, path = exported
    table = latency_table(path, threads=1, layout="split", blocks=4, block_runs=3)
    assert table["exits"] == table["layouts"]["split"]["exits"] and min(table["exits"]) > 0
    assert set(table["layouts"]) == {"file", "split"} and len(table["exits"]) == 3 and table["device"]
    assert [set(ratio) >= {"value", "low", "high", "verdict"} for ratio in table["split_over_file"]] == [True] * 3
    json.dumps(table, allow_nan=False)
    assert latency_table_text(table).count("split is") == 3

    before = (path / "manifest.json").read_bytes()
    record_latency(path, [table], tmp_path / "measured")
    with open_bundle(tmp_path / "measured") as bundle:
        (entry,) = bundle.manifest.measured
        assert entry.device == table["device"]
        assert entry.exits_us["file"] == tuple(table["layouts"]["file"]["exits"])
        assert [r.verdict for r in entry.split_over_file] == [r["verdict"] for r in table["split_over_file"]]
        with open_bundle(path) as old:
            assert not old.manifest.measured
            assert bundle.manifest == dataclasses.replace(
                old.manifest, measured=(entry,), files={**old.manifest.files, **_runtime(bundle)}
            )
        again = json.loads(json.dumps({**table, "bundle_sha256": bundle.sha256}))
        other = {**again, "device": "a board", "fingerprint": "0", "split_over_file": None}
        half = {**again, "layouts": {"file": {**again["layouts"]["file"], "exits": [1.0, 2.0]}}}
        wrong = [
            ([table], "was measured on another bundle"),
            ([again, again], "two latency tables are of"),
            ([{}], "latency table 0 is none that `latency-table` wrote: KeyError"),
            ([other, {**other, "device": None}], "latency table 1 is none that"),
            ([half], r"does not fit .*: exits_us\.file has 2 numbers for 3 exits"),
        ]
        for tables, message in wrong:
            with pytest.raises(InputError, match=message):
                record_latency(bundle, tables, tmp_path / "again")
        record_latency(bundle, [again, other], tmp_path / "two.zip")
    with open_bundle(tmp_path / "two.zip") as bundle:
        assert [e.device for e in bundle.manifest.measured] == [table["device"], "a board"], (
            "a device stands there once"
        )
        ratio = entry.split_over_file[0]
        for changes, message in (
            ({"exits_us": {"file": (1.0, 2.0)}}, r"exits_us\.file has 2 numbers for 3 exits"),
            ({"exits_us": {"file": (1.0, 2.0, 0.0)}}, "which are no times"),
            ({"exits_us": {"split": entry.exits_us["split"]}}, "has the layouts"),
            ({"split_over_file": entry.split_over_file[:2]}, "2 ratios for 3 exits"),
            ({"split_over_file": (dataclasses.replace(ratio, low=9e9),) * 3}, "in the interval 9000000000"),
            ({"split_over_file": (dataclasses.replace(ratio, verdict="best"),) * 3}, "the verdict 'best'"),
        ):
            with pytest.raises(BundleError, match=message):
                check_consistency(
                    dataclasses.replace(bundle.manifest, measured=(dataclasses.replace(entry, **changes),))
                )
        for manifest, message in (
            (dataclasses.replace(bundle.manifest, measured=(entry, entry)), "holds one device twice"),
            (dataclasses.replace(bundle.manifest, split=None, measured=(entry,)), "has no split layout"),
        ):
            with pytest.raises(BundleError, match=message):
                check_consistency(manifest)
    assert verify(tmp_path / "two.zip", layout="split").passed
    for out in (tmp_path / "measured", tmp_path / "none" / "b", path / "b"):
        with pytest.raises(InputError, match="cannot write"):
            record_latency(path, [table], out)
    assert (path / "manifest.json").read_bytes() == before
    shutil.copytree(path, tmp_path / "altered")
    with open_bundle(tmp_path / "altered") as bundle:
        with (tmp_path / "altered" / "model.onnx").open("ab") as stream:
            stream.write(b"\0")
        with pytest.raises(BundleError, match=r"'model\.onnx' was altered since"):
            record_latency(bundle, [table], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".*")), "nothing half written is left"


def _runtime(bundle):
    return {name: entry for name, entry in bundle.manifest.files.items() if name == "edge_runtime.pyz"}


def test_a_bundle_without_the_files_says_how_to_get_them(exported):
    _, path = exported
    with open_bundle(path) as bundle:
        manifest = dataclasses.replace(bundle.manifest, split=None)
        with pytest.raises(InputError, match="no split layout: export it with"):
            bundle_session(bundle.folder, manifest, SessionOptions(layout="split"))


def test_a_split_layout_that_answers_otherwise_is_refused(exported, tmp_path):
    _, path = exported
    shutil.copytree(path, tmp_path / "b")
    level = tmp_path / "b" / "split" / "level1.onnx"
    model = ir.load(level)
    weight = next(v for name, v in model.graph.initializers.items() if name.endswith("weight"))
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)
    ir.save(model, level)
    with open_bundle(path) as bundle:
        manifest = bundle.manifest
    for name in ("manifest.json", "manifest.sha256"):
        (tmp_path / "b" / name).unlink()
    write_manifest(tmp_path / "b", manifest)
    with pytest.raises(ParityError, match="the split layout disagrees, no bundle was written"):
        prove_split(tmp_path / "b")


def test_a_manifest_whose_split_does_not_fit_is_refused(exported):
    _, path = exported
    with open_bundle(path) as bundle:
        manifest = bundle.manifest
        short = dataclasses.replace(manifest.split, files=manifest.split.files[:2])
        with pytest.raises(BundleError, match="split lists 2 files for 3 exits"):
            check_consistency(dataclasses.replace(manifest, split=short))
        sessions = [session_on(bundle.path(name)).session for name in manifest.split.files]
    with pytest.raises(BundleError, match="level 0 of the split model reads"):
        SplitSession(sessions[1:], ["image"], {})
