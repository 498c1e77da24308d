"""What a model reads from other files is what the manifest lists, wherever in the protobuf it says so."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from edgewright.edge_runtime import BundleError, load, open_bundle, pack_zip, session_on
from edgewright.edge_runtime.bundle.external_data import require_listed

LISTED = {"model.onnx": 500, "model.onnx.data": 64, "split/level1.onnx": 500, "split/level1.onnx.data": 64}


def external(location="../../file", name="secret", **more):
    tensor = TensorProto(name=name, dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, "offset": "0", "length": "16", **more}.items():
        if text is not None:
            tensor.external_data.add(key=key, value=text)
    return tensor


def graph(nodes=(), initializers=(), sparse=()):
    return helper.make_graph(list(nodes), "g", [], [], list(initializers), sparse_initializer=list(sparse))


def node(kind="Custom", **attributes):
    made = onnx.NodeProto(op_type=kind)
    for name, given in attributes.items():
        if isinstance(given, AttributeProto):
            made.attribute.append(given)
        else:
            made.attribute.append(helper.make_attribute(name, given))
    return made


def model(main, **more):
    return onnx.ModelProto(graph=main, ir_version=10, **more)


def sparse(values=None, indices=None):
    plain = numpy_helper.from_array(np.zeros(1, np.float32), "plain")
    return onnx.SparseTensorProto(values=values or plain, indices=indices or plain, dims=[4])


def function(**more):
    return onnx.FunctionProto(name="f", domain="d", **more)


PLACES = {
    "initializer": lambda t: model(graph(initializers=[t])),
    "branch": lambda t: model(graph([node("If", then_branch=graph(initializers=[t]))])),
    "loop in a branch": lambda t: model(
        graph([node("If", else_branch=graph([node("Loop", body=graph([node("Constant", value=t)]))]))])
    ),
    "attribute": lambda t: model(graph([node("Constant", value=t)])),
    "list of tensors": lambda t: model(graph([node(values=AttributeProto(name="v", tensors=[t], type=9))])),
    "list of graphs": lambda t: model(graph([node(bodies=[graph(), graph(initializers=[t])])])),
    "sparse values": lambda t: model(graph(sparse=[sparse(values=t)])),
    "sparse indices": lambda t: model(graph(sparse=[sparse(indices=t)])),
    "sparse attribute": lambda t: model(graph([node("Constant", sparse_value=sparse(values=t))])),
    "function": lambda t: model(graph(), functions=[function(node=[node("Constant", value=t)])]),
    "default of a function": lambda t: model(
        graph(), functions=[function(attribute_proto=[helper.make_attribute("a", t)])]
    ),
    "training": lambda t: model(graph(), training_info=[onnx.TrainingInfoProto(algorithm=graph(initializers=[t]))]),
    "second half of the graph": lambda t: model(graph(initializers=[external("model.onnx.data")])),
}


def check(proto, path, name="model.onnx"):
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    require_listed(path, name, LISTED, Path("BUNDLE"))


@pytest.mark.parametrize("place", PLACES)
def test_a_location_outside_is_refused_wherever_it_is(place, tmp_path):
    data = PLACES[place](external()).SerializeToString()
    if place == "second half of the graph":  # protobuf joins the two
        data += model(graph([node("If", then_branch=graph(initializers=[external()]))])).SerializeToString()
    with pytest.raises(BundleError, match=r"'secret' in model.onnx lies in '../../file'.*do not use"):
        check(data, tmp_path / "m")
    good = PLACES[place](external("model.onnx.data")).SerializeToString()
    check(good, tmp_path / "m")


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "C:\\secret",
        "MODEL.onnx.data",
        "./model.onnx.data",
        "split/../model.onnx.data",
        "model.onnx.data/",
        "model.onnx.data\0",
        "",
        "manifest.json",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_another_spelling_is_another_file(location, tmp_path):
    with pytest.raises(BundleError, match="none of the files"):
        check(PLACES["branch"](external(location)), tmp_path / "m")


def test_two_ways_to_write_a_letter_are_two_files(tmp_path):
    listed = {unicodedata.normalize("NFC", "gewichte-für.data"): 64}
    path = tmp_path / "m"
    for form, right in (("NFC", True), ("NFD", False)):
        name = unicodedata.normalize(form, "gewichte-für.data")
        path.write_bytes(PLACES["initializer"](external(name)).SerializeToString())
        if right:
            require_listed(path, "model.onnx", listed, Path("BUNDLE"))
        else:
            with pytest.raises(BundleError, match="none of the files"):
                require_listed(path, "model.onnx", listed, Path("BUNDLE"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "56"}, "ends beyond 'model.onnx.data', which has 64 bytes"),
        ({"length": "65"}, "ends beyond"),
        ({"offset": "18446744073709551615"}, "offset"),
        ({"offset": "-16"}, "offset '-16'"),
        ({"length": "1e3"}, "length '1e3'"),
    ],
)
def test_a_range_beyond_the_file_is_refused(entries, said, tmp_path):
    given = {"location": "model.onnx.data", **entries}
    with pytest.raises(BundleError, match=said):
        check(PLACES["branch"](external(**given)), tmp_path / "m")


def test_a_location_is_relative_to_the_models_folder(tmp_path):
    check(PLACES["branch"](external("level1.onnx.data")), tmp_path / "m", "split/level1.onnx")
    with pytest.raises(BundleError, match="none of the files"):
        check(PLACES["branch"](external("model.onnx.data")), tmp_path / "m", "split/level1.onnx")


def test_what_readers_may_understand_differently_is_refused(tmp_path):
    twice = external("model.onnx.data")
    twice.external_data.add(key="location", value="../../file")
    with pytest.raises(BundleError, match="does not say clearly"):
        check(PLACES["branch"](twice), tmp_path / "m")
    # a field whose number is 5 in the lower 32 bits alone
    tensor = external().SerializeToString()
    key = bytes([0xAA, 0x80, 0x80, 0x80, 0x10])
    main = key + bytes([len(tensor)]) + tensor
    with pytest.raises(BundleError, match="damaged"):
        check(bytes([7 << 3 | 2, len(main)]) + main, tmp_path / "m")


def test_a_branch_nested_two_thousand_deep_ends_no_process(tmp_path):
    def field(number, payload):
        size, left = b"", len(payload)
        while left > 0x7F:
            size, left = size + bytes([left & 0x7F | 0x80]), left >> 7
        return bytes([number << 3 | 2]) + size + bytes([left]) + payload

    inner = field(5, external().SerializeToString())
    for _ in range(2000):
        inner = field(1, field(5, field(6, inner)))
    with pytest.raises(BundleError, match="none of the files"):
        check(field(7, inner), tmp_path / "m")


def test_a_sealed_bundle_that_reads_outside_is_refused_before_a_session_exists(bundle, tmp_path, monkeypatch):
    proto = onnx.load(str(bundle / "model.onnx"))
    branch = next(n for n in proto.graph.node if n.op_type == "If")
    branch = next(a.g for a in branch.attribute if a.name == "else_branch")
    branch.initializer[0].CopyFrom(external("../../secret", branch.initializer[0].name))
    (bundle / "model.onnx").write_bytes(proto.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(text)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest() + "\n")

    def session(*_, **__):
        raise AssertionError("a session was made")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    for use in (open_bundle, load, lambda path: pack_zip(path, tmp_path / "b.zip")):
        with pytest.raises(BundleError, match=r"'../../secret', which is none of the files"):
            use(bundle)


def test_old_runtimes_find_the_weights_of_branches_when_thresholds_are_set(bundle, tmp_path, monkeypatch):
    """They take a model given as bytes to lie in the working directory; so it gets a place beside its weights."""
    proto = onnx.load(str(bundle / "model.onnx"))
    del proto.graph.input[1]  # the thresholds cannot be given as an input: the bytes are changed
    folder = tmp_path / "net"
    folder.mkdir()
    onnx_ir.save(onnx_ir.from_proto(proto), folder / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=64)
    x = {"x": np.zeros((1, 3, 6, 6), np.float32)}
    want = session_on(folder / "m.onnx", thresholds=[2.0, 2.0]).run(x)
    assert want["exit_index"].tolist() == [2]
    sources, make = [], onnxruntime.InferenceSession

    def session(source, *arguments, **options):
        sources.append(source)
        return make(source, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for version, found in (("1.20.1", str), ("1.21.0", bytes)):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        got = session_on(folder / "m.onnx", thresholds=[2.0, 2.0]).run(x)
        np.testing.assert_array_equal(got["scores"], want["scores"])
        assert isinstance(sources[-1], found)
    assert not Path(sources[0]).parent.exists()
