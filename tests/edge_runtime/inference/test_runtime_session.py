from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.edge_runtime import (
    BundleError,
    EdgewrightError,
    InputError,
    Prediction,
    ProviderError,
    ProviderFallbackWarning,
    load,
    open_bundle,
    pack_zip,
    session_on,
)
from edgewright.edge_runtime.inference import providers as providers_module
from edgewright.edge_runtime.inference.onnx_file import has_branches, with_vector
from edgewright.edge_runtime.inference.preprocess import preprocess_image
from edgewright.edge_runtime.inference.providers import CPU, Placement, placement_of, provider_names, session_providers

CUDA = "CUDAExecutionProvider"


def test_predict_gives_what_the_network_gives(bundle: Path, net, rows: np.ndarray) -> None:
    with load(bundle, threads=1) as runner:
        prediction = runner.predict(rows)
        one = runner.predict(rows[1])
    want, _ = net.run(rows, np.array(runner.thresholds, np.float32))
    assert prediction.label.tolist() == want["label"].tolist() and prediction.label.dtype == np.int64
    assert prediction.exit_index.tolist() == want["exit_index"].tolist()
    np.testing.assert_allclose(prediction.scores, want["scores"], atol=1e-5)
    names = ["ant", "bee", "cat", "dog"]
    assert prediction.label_names == [names[i] for i in prediction.label]
    assert one.label.tolist() == [prediction.label[1]] and one.scores.shape == (1, 4)


def test_a_zip_lives_as_long_as_its_runner(bundle: Path, tmp_path: Path, rows: np.ndarray) -> None:
    pack_zip(bundle, tmp_path / "b.zip")
    runner = load(tmp_path / "b.zip")
    folder = runner.path.parent
    assert folder.is_dir() and runner.predict(rows).label.shape == (3,)
    runner.close()
    assert not folder.exists()


def test_a_failed_load_leaves_no_folder_behind(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    pack_zip(bundle, tmp_path / "b.zip")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(InputError):
        load(tmp_path / "b.zip", optimization_level="most")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_open_bundle_stays_open(bundle: Path, rows: np.ndarray) -> None:
    with open_bundle(bundle) as opened:
        with load(opened) as first:
            label = first.predict(rows).label
        with load(opened, threads=2) as second:
            assert second.predict(rows).label.tolist() == label.tolist()


def test_logits_become_probabilities(flat_bundle: Path, rows: np.ndarray) -> None:
    with load(flat_bundle) as runner:
        prediction = runner.predict(rows)
        logits = runner.run({"x": rows})["logits"]
    np.testing.assert_allclose(prediction.scores.sum(axis=1), 1, rtol=1e-6)
    assert prediction.label.tolist() == logits.argmax(axis=1).tolist()
    assert prediction.exit_index.tolist() == [0, 0, 0] and prediction.scores.dtype == np.float32


def test_run_passes_nan_on_and_it_shows(bundle: Path, flat_bundle: Path, rows: np.ndarray) -> None:
    rows[1, 0, 0, 0] = np.nan
    for path in (bundle, flat_bundle):
        with load(path) as runner:
            scores = runner.run_rows({"x": rows})
        name = "scores" if "scores" in scores else "logits"
        assert np.isnan(scores[name][1]).any() and np.isfinite(scores[name][[0, 2]]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["bundle", "flat_bundle"])
def test_predict_refuses_one_row_that_is_not_finite(request, rows: np.ndarray, which: str, value: float) -> None:
    with load(request.getfixturevalue(which)) as runner:
        runner.predict(rows[:1])  # the second call of a form takes the short way
        for given in (rows[:1], rows[0], {"x": rows[:1]}):
            rows[0, 2, 1, 4] = value
            with pytest.raises(InputError, match=rf"input 'x', row 0: {value} at \[2, 1, 4\]: nothing can be said"):
                runner.predict(given)
        rows[0, 2, 1, 4] = 1.0
        assert runner.predict(rows[:1]).refused == {}


@pytest.mark.parametrize("which", ["bundle", "flat_bundle"])
def test_predict_marks_the_unusable_rows_of_a_batch(request, rows: np.ndarray, which: str) -> None:
    with load(request.getfixturevalue(which)) as runner:
        want = runner.predict(rows)
        spoilt = rows.copy()
        spoilt[1, 0, 0, 0], spoilt[1, 2, 2, 2] = np.nan, np.inf
        got = runner.predict(spoilt)
        assert np.isnan(spoilt[1]).any()  # the caller's array is not touched
        assert got.refused == {1: "input 'x', row 1: nan at [0, 0, 0] and 1 more"}
        assert got.label[1] == got.exit_index[1] == -1 and np.isnan(got.scores[1]).all()
        assert got.label_names[1] == "refused" and got.score_kinds[1] == "none"
        for name in ("label", "scores", "exit_index"):
            assert np.array_equal(getattr(got, name)[[0, 2]], getattr(want, name)[[0, 2]])
        spoilt[:] = np.nan
        with pytest.raises(InputError, match="row 0: nan"):
            runner.predict(spoilt)


def test_a_batch_of_two_inputs_of_which_one_is_not_finite(tmp_path: Path) -> None:
    path = _two_input_model(tmp_path / "two.onnx", output="logits")
    a, b = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    b[0, 2] = np.nan
    prediction = session_on(path).predict({"a": a, "b": b})
    assert prediction.refused == {0: "input 'b', row 0: nan at [2]"} and prediction.label.tolist() == [-1, 0]
    with pytest.raises(InputError, match="input 'b' holds NaN or infinity, and no row"):
        session_on(path).predict({"a": a[:1], "b": b})


def test_a_network_that_overflows_is_named(flat_bundle: Path, net, rows: np.ndarray) -> None:
    rows[1] = np.finfo(np.float32).max * np.sign(net.bodies[0][:, 0]).reshape(rows[1].shape)
    with load(flat_bundle) as runner:
        prediction = runner.predict(rows)
        assert list(prediction.refused) == [1] and "overflows" in prediction.refused[1]
        assert prediction.label[1] == -1 and (prediction.label[[0, 2]] >= 0).all()
        with pytest.raises(EdgewrightError, match="not finite for a finite input"):
            runner.predict(rows[1])


def test_a_closed_runner_says_so(bundle: Path, rows: np.ndarray) -> None:
    runner = load(bundle)
    runner.close()
    with pytest.raises(EdgewrightError, match="is closed: load it again"):
        runner.predict(rows)


def test_the_short_way_of_known_forms_gives_the_same_and_checks_the_rest(bundle: Path, rows: np.ndarray) -> None:
    with load(bundle) as runner:
        for given in (rows[:1], rows[0], rows):
            first, second = runner.predict(given), runner.predict(given.copy())
            assert np.array_equal(first.scores, second.scores) and first.scores.shape == second.scores.shape
        with pytest.raises(InputError, match="got float64"):
            runner.predict(rows[:1].astype(np.float64))
        with pytest.raises(InputError, match=r"got float32 \[1, 3, 6, 5\]"):
            runner.predict(rows[:1, :, :, :5])
        # a list, a subclass and another order of bytes or of memory never take it
        assert np.array_equal(runner.predict(np.asfortranarray(rows[:1])).scores, runner.predict(rows[:1]).scores)
        with pytest.raises(InputError, match="got >f4"):
            runner.predict(rows[:1].astype(">f4"))
        runner.run({"x": rows[:1]})
        with pytest.raises(InputError, match="unknown input 'y'"):
            runner.run({"x": rows[:1], "y": rows[:1]})
        with pytest.raises(InputError, match="input 'x' is missing"):
            runner.run({})


def test_what_a_score_is(bundle: Path) -> None:
    scores = np.array([[0, 1, 0], [0.2, 0.8, 0], [0.2, 0.3, 0.5], [0, 1, 0], [np.nan] * 3], np.float32)
    label, exits = np.array([1, 1, 2, 1, -1]), np.array([0, 1, 1, 1, -1])
    prediction = Prediction(label, scores, exits, (), ("early", "final"), True, {4: "NaN"})
    assert prediction.score_kinds == [
        "exclusion",
        "probability_of_remaining",
        "probability",
        "probability_of_remaining",
        "none",
    ]
    assert prediction._replace(excludes=False).score_kinds == ["probability"] * 4 + ["none"]


def test_a_batch_in_a_single_row_model_is_looped(bundle: Path, rows: np.ndarray) -> None:
    with load(bundle) as runner:
        outputs = runner.run_rows({"x": rows})
        parts = [runner.run({"x": rows[i : i + 1]}) for i in range(3)]
    for name, value in outputs.items():
        assert np.array_equal(value, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"input 'x' is missing: wanted float32 \[1, 3, 6, 6\]"),
        ({"y": np.zeros(1)}, "unknown input 'y'.*the model takes x"),
        ({"X": np.zeros(1)}, "unknown input 'X'"),
        ({"x": np.zeros((1, 3, 6, 6))}, r"got float64 \[1, 3, 6, 6\]: convert it with \.astype\('float32'\)"),
        (
            {"x": np.zeros((1, 3, 6, 7), np.float32)},
            r"wanted .*\[1, 3, 6, 6\], got float32 \[1, 3, 6, 7\]",
        ),
        ({"x": np.zeros((3, 6, 6), np.float32)}, r"got float32 \[3, 6, 6\]"),
        ({"x": np.zeros((2, 3, 6, 6), np.float32)}, "one row a run, use predict"),
        ({"x": np.zeros((1, 3, 6, 6), ">f4")}, "got >f4"),
        ({"x": np.zeros((1, 6, 6, 3), np.uint8)}, r"got uint8 \[1, 6, 6, 3\]$"),  # another dtype would not help
    ],
)
def test_feeds_that_do_not_fit_are_named(bundle: Path, feeds, message: str) -> None:
    with load(bundle) as runner, pytest.raises(InputError, match=message):
        runner.run(feeds)


def test_an_empty_batch_is_refused(bundle: Path, flat_bundle: Path) -> None:
    empty = np.zeros((0, 3, 6, 6), np.float32)
    with load(flat_bundle) as runner, pytest.raises(InputError, match="'x' is empty"):
        runner.run({"x": empty})
    with load(bundle) as runner, pytest.raises(InputError, match="at least one"):
        runner.predict(empty)


def _two_input_model(path: Path, output: str = "sum") -> Path:
    nodes = [helper.make_node("Add", ["a", "b"], [output], name="add")]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "time"]) for n in "ab"]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "time"])]
    graph = helper.make_graph(nodes, "two", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_bare_model_with_two_inputs(tmp_path: Path) -> None:
    runner = session_on(_two_input_model(tmp_path / "two.onnx"))
    a, b = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    assert runner.run({"a": a, "b": a})["sum"].tolist() == (2 * a).tolist()
    with pytest.raises(InputError, match="axis 'time' has 4 and is 3 in input 'a'"):
        runner.run({"a": a, "b": b})
    with pytest.raises(InputError, match="has 2 inputs: give a mapping"):
        runner.predict(a)
    with pytest.raises(InputError, match="neither 'label' nor 'logits'"):
        runner.predict({"a": a, "b": a})


def test_a_failure_inside_the_graph_names_the_file(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "i"], ["row"], name="gather")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.zeros(3, np.float32), "table")],
    )
    path = tmp_path / "gather.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(EdgewrightError, match=r"failed while running .*gather\.onnx"):
        session_on(path).run({"i": np.array([9])})


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
@pytest.mark.parametrize(("thresholds", "wanted"), [((0, 0), 0), ((2, 0), 1), ((2, 2), 2)])
def test_thresholds_force_every_exit_at_every_optimization_level(
    bundle: Path, rows: np.ndarray, level: str, thresholds, wanted: int
) -> None:
    # The graph reads thresholds[k] with a constant index: with SessionOptions.add_initializer the value in
    # the file is folded in from "basic" on, and the new one silently ignored.
    with load(bundle, thresholds=thresholds, optimization_level=level) as runner:
        assert runner.predict(rows).exit_index.tolist() == [wanted] * 3
        assert runner.thresholds == thresholds


def test_an_operating_point_by_name(bundle: Path, rows: np.ndarray) -> None:
    with load(bundle, operating_point="deep") as runner:
        assert runner.predict(rows).exit_index.tolist() == [2, 2, 2]
    with load(bundle) as stored, load(bundle, operating_point="default") as named:
        assert stored.thresholds == pytest.approx(named.thresholds)
        assert stored.predict(rows).exit_index.tolist() == named.predict(rows).exit_index.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5]}, r"has 2 thresholds, got 1"),
        ({"thresholds": [0.5, float("nan")]}, "must be finite"),
        ({"thresholds": [0.5, 1e300]}, "finite in float32"),
        (
            {"thresholds": [0.5, 2.5]},
            r"threshold of exit 1 \(body1\), 2.5 lies outside the range of max_probability, 2 \(never leaves\) to 0",
        ),
        ({"thresholds": [-0.1, 1]}, r"exit 0 \(body0\), -0.1 lies outside"),
        ({"operating_point": "depe"}, "did you mean 'deep'"),
        ({"operating_point": "deep", "thresholds": [1, 1]}, "not both"),
        ({"threads": 0}, "positive number"),
        ({"optimization_level": "most"}, "use disabled, basic, extended, all"),
        ({"providers": "cdua"}, "did you mean 'cuda'"),
        ({"providers": []}, "empty"),
    ],
)
def test_options_that_do_not_fit(bundle: Path, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(bundle, **options)


def test_thresholds_for_a_model_without_exits(flat_bundle: Path) -> None:
    with pytest.raises(InputError, match="no early exits"):
        load(flat_bundle, thresholds=[0.5])
    with pytest.raises(InputError, match="no initializer 'thresholds'"):
        session_on(flat_bundle / "model.onnx", thresholds=[0.5])


def test_a_file_with_branches_has_no_memory_plan(bundle: Path, flat_bundle: Path, tmp_path: Path) -> None:
    for path, branches in ((bundle, True), (flat_bundle, False)):
        assert has_branches(path / "model.onnx") is branches
        with load(path) as runner:
            assert runner.session.get_session_options().enable_mem_pattern is not branches
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_bytes(b"no model at all")
    (tmp_path / "cut.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:100])
    for name in ("empty", "text", "cut", "none"):
        assert not has_branches(tmp_path / f"{name}.onnx")


def test_setting_a_vector_in_a_file(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "model.onnx"
    changed = onnx.load_from_string(with_vector(path, "thresholds", [0.25, 0.75]))
    original = onnx.load(path)
    values = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    assert values["thresholds"].tolist() == [0.25, 0.75]
    for tensor in original.graph.initializer:
        if tensor.name == "thresholds":
            # The other way to store floats, as torch or hand-written models do.
            tensor.CopyFrom(helper.make_tensor("thresholds", TensorProto.FLOAT, [2], [0.1, 0.2]))
    onnx.save(original, tmp_path / "floats.onnx")
    again = onnx.load_from_string(with_vector(tmp_path / "floats.onnx", "thresholds", [0.25, 0.75]))
    stored = {t.name: numpy_helper.to_array(t).tolist() for t in again.graph.initializer}
    assert stored == {name: value.tolist() for name, value in values.items()}
    for name, given, message in (
        ("thresholds", [1.0], "has 2 values, got 1"),
        ("body0.weight", [1.0], "no float32 vector"),
        ("at0", [1.0], "no float32 vector"),
        ("nothing", [1.0], "no initializer"),
    ):
        with pytest.raises(InputError, match=message):
            with_vector(path, name, given)
    data = path.read_bytes()
    for cut in (1, 10, 100, len(data) // 2):
        (tmp_path / "cut.onnx").write_bytes(data[:cut])
        with pytest.raises(InputError):
            with_vector(tmp_path / "cut.onnx", "thresholds", [0.25, 0.75])


def test_weights_beside_the_model_are_found_when_thresholds_are_set(
    bundle: Path, tmp_path: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.load(bundle / "model.onnx")
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=100,
    )
    assert (folder / "model.onnx.data").stat().st_size > 1000
    monkeypatch.chdir(tmp_path)
    runner = session_on("external/model.onnx", thresholds=[2, 0])
    assert runner.predict(rows).exit_index.tolist() == [1, 1, 1]


def test_weights_outside_the_folder_are_refused(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.load(bundle / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=100)
    shutil.move(folder / "w.data", tmp_path / "w.data")
    data = (folder / "model.onnx").read_bytes()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert data != (folder / "model.onnx").read_bytes()
    with pytest.raises(InputError, match="cannot load"):
        session_on(folder / "model.onnx")


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        session_on(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"cannot load .*bad\.onnx"):
        session_on(tmp_path / "bad.onnx")


def test_a_manifest_that_is_not_the_models(bundle: Path, flat_bundle: Path) -> None:
    with open_bundle(bundle) as opened, pytest.raises(BundleError, match="the graph's outputs are"):
        session_on(flat_bundle / "model.onnx", manifest=opened.manifest)


def test_the_optimized_graph_can_be_kept(bundle: Path, tmp_path: Path) -> None:
    session_on(bundle / "model.onnx", optimization_level="basic", optimized_path=tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").graph.node


def test_placement_is_reported(bundle: Path) -> None:
    with load(bundle) as runner:
        placement = runner.placement
    assert placement.requested == placement.session == (CPU,)
    if placement.nodes_per_provider is not None:
        assert placement.nodes_per_provider[CPU] > 3
    assert placement.cpu_nodes == () and placement.to_dict()["method"]


def test_placement_where_the_runtime_records_none() -> None:
    class Session:
        def __init__(self, *names: str) -> None:
            self.names = names

        def get_providers(self) -> list[str]:
            return list(self.names)

    assert placement_of(Session(CPU), (CPU,), False).method == "the CPU is the session's only provider"
    strict = placement_of(Session(CUDA, CPU), (CUDA,), True)
    assert strict.method == "session.disable_cpu_ep_fallback" and strict.nodes_per_provider is None


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without CUDA")
class TestWithoutCuda:
    @pytest.mark.parametrize("provider", ["cuda", "tensorrt", CUDA])
    def test_asking_for_it_fails_and_says_what_to_do(self, bundle: Path, provider: str) -> None:
        with pytest.raises(ProviderError) as caught:
            load(bundle, providers=[provider])
        text = str(caught.value)
        assert provider_names(provider)[0] in text
        assert "install onnxruntime-gpu" in text and "--allow-fallback" in text and caught.value.exit_code == 5

    @pytest.mark.parametrize("provider", ["cuda", "tensorrt", "trt", ["tensorrt", "cuda"]])
    def test_fallback_is_allowed_on_request_and_reported(self, bundle: Path, rows: np.ndarray, provider) -> None:
        with (
            pytest.warns(ProviderFallbackWarning, match="was asked for, this runs on CPUExecutionProvider") as caught,
            load(bundle, providers=provider, allow_fallback=True) as runner,
        ):
            assert runner.predict(rows).label.shape == (3,)
        placement = runner.placement
        assert placement.requested == provider_names(provider) and placement.session == (CPU,)
        assert placement.nodes_per_provider is None or placement.cpu_nodes
        assert not placement.strict and len(placement.fallback) == len(placement.requested)
        for name in placement.requested:
            assert f"{name} is not part" in str(caught[0].message) or f"{name} could not start" in str(
                caught[0].message
            )

    def test_a_model_that_does_not_load_is_no_matter_of_the_provider(self, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"hello")
        with pytest.raises(InputError, match=r"cannot load .*bad\.onnx"):
            session_on(tmp_path / "bad.onnx", providers=["tensorrt", "cuda"], allow_fallback=True)

    def test_a_list_with_the_cpu_in_it_is_not_an_excuse(self, bundle: Path) -> None:
        with pytest.raises(ProviderError):
            load(bundle, providers=["cuda", "cpu"])


def test_providers_that_this_build_does_not_have() -> None:
    with pytest.raises(ProviderError, match="QNNExecutionProvider was asked for, this ONNX Runtime has CPU"):
        session_providers(["QNNExecutionProvider"], [CPU], allow_fallback=False)
    assert session_providers(["QNNExecutionProvider"], [CPU], allow_fallback=True) == [CPU]
    assert provider_names(None) == (CPU,)
    assert provider_names(["trt", "cuda", "cuda"]) == ("TensorrtExecutionProvider", CUDA)
    assert "the session has" in str(providers_module.not_started([CUDA], [CPU]))


@pytest.mark.parametrize("provider", ["TensorrtExecutionProvider", CUDA])
@pytest.mark.parametrize("raises", [True, False])
def test_a_provider_that_does_not_start(
    bundle: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, provider: str, raises: bool
) -> None:
    """ONNX Runtime ends in an exception for some providers and leaves out others: both are a fallback or an error."""
    import onnxruntime

    real, asked = onnxruntime.InferenceSession, []

    def start(source, options, providers, **more):
        asked.append(list(providers))
        if raises and provider in providers:
            raise RuntimeError("no such library")
        return real(source, options, providers=[CPU], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, CPU])
    monkeypatch.setattr(providers_module, "_load_failure", lambda name: f"lib of {name} is missing")
    with pytest.raises(ProviderError, match=rf"{provider} was asked for .*lib of {provider} is missing") as caught:
        load(bundle, providers=[provider])
    assert caught.value.exit_code == 5
    asked.clear()
    with pytest.warns(ProviderFallbackWarning, match=rf"{provider} could not start \(lib of {provider} is missing\)"):
        runner = load(bundle, providers=[provider], allow_fallback=True)
    assert runner.predict(rows).label.shape == (3,)
    assert asked == ([[provider, CPU], [CPU]] if raises else [[provider, CPU]])
    assert runner.placement.fallback == (f"{provider} could not start (lib of {provider} is missing)",)


def test_nodes_that_the_provider_leaves_are_told() -> None:
    placement = Placement((CUDA,), (CUDA, CPU), False, "record", {CUDA: 40, CPU: 3}, ("a", "b", "c"))
    assert placement.text() == f"{CUDA} (40 nodes), {CPU} (3 nodes)"
    with pytest.warns(ProviderFallbackWarning, match="3 nodes were not taken"):
        providers_module.warn_of_fallback(placement.to_dict())


class TestPreprocess:
    def test_images_are_resized_and_normalised(self, bundle: Path) -> None:
        image = np.random.default_rng(0).integers(0, 256, (17, 11, 3), dtype=np.uint8)
        with load(bundle) as runner:
            assert runner.manifest is not None
            pixels = preprocess_image(image, runner.manifest.preprocessing)
            assert pixels.shape == (1, 3, 6, 6) and pixels.dtype == np.float32
            by_hand, by_itself = runner.predict(pixels), runner.predict(image)
            both = runner.predict(np.stack([image, image]))
        assert np.array_equal(by_hand.scores, by_itself.scores)
        assert both.label.tolist() == by_itself.label.tolist() * 2

    def test_without_resizing_the_formula_is_exact(self, bundle: Path) -> None:
        with open_bundle(bundle) as opened:
            image = np.arange(108, dtype=np.uint8).reshape(6, 6, 3)
            pixels = preprocess_image(image, opened.manifest.preprocessing)
        want = (image.astype(np.float32) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(pixels[0], want.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("size", [(5, 9), (64, 48), (13, 40), (20, 30), (1, 1)])
    def test_resizing_is_pillows(self, size: tuple[int, int]) -> None:
        images = pytest.importorskip("PIL.Image")
        from edgewright.edge_runtime.inference.preprocess import resize_bilinear

        image = np.random.default_rng(0).random((20, 30), np.float32)
        want = np.asarray(images.fromarray(image).resize((size[1], size[0]), images.Resampling.BILINEAR), np.float32)
        got = resize_bilinear(image[None, :, :, None], size)[0, :, :, 0]
        np.testing.assert_allclose(got, want, atol=2e-6)

    @pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (3, 6, 6), (0, 6, 3), (1, 1, 6, 6, 3)])
    def test_images_of_another_form_are_refused(self, bundle: Path, shape: tuple[int, ...]) -> None:
        with load(bundle) as runner, pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"):
            runner.predict(np.zeros(shape, np.uint8))


NEVER, ALWAYS = 2.0, 0.0


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_thresholds_that_are_set_are_the_ones_that_run(bundle: Path, rows: np.ndarray, level: str) -> None:
    for values, expected in (((NEVER, ALWAYS), 1), ((ALWAYS, NEVER), 0), ((NEVER, NEVER), 2)):
        runner = load(bundle, thresholds=values, optimization_level=level)
        kept = [np.full(2, 9.0, np.float32) for _ in range(200)]  # takes the place of what nobody holds
        assert (runner.predict(rows).exit_index == expected).all() and kept


def test_setting_thresholds_reads_no_weights_into_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("the whole model is read")

    monkeypatch.setattr("edgewright.edge_runtime.inference.session.with_vector", refuse)
    load(bundle, thresholds=(NEVER, ALWAYS)).close()


def test_thresholds_that_are_no_input_are_written_into_the_bytes(
    bundle: Path, tmp_path: Path, rows: np.ndarray
) -> None:
    model = onnx.load(bundle / "model.onnx")
    del model.graph.input[1]
    onnx.save(model, tmp_path / "model.onnx")
    runner = session_on(tmp_path / "model.onnx", thresholds=(NEVER, ALWAYS))
    assert (runner.run_rows({"x": rows})["exit_index"] == 1).all()
    assert runner.session._model_bytes is None
