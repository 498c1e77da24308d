from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import (
    BundleError,
    GoldenCase,
    InputError,
    Manifest,
    bench,
    load,
    open_bundle,
    pack_zip,
    read_golden,
    verify,
    write_golden,
    write_manifest,
)
from edgewright.edge_runtime.bundle import bundle as bundle_module
from edgewright.edge_runtime.bundle.golden import read_npz, write_npz
from edgewright.edge_runtime.bundle.manifest import FileEntry
from edgewright.edge_runtime.bundle.replacing import replaced


def _seal(folder: Path, change) -> None:
    """Changes the manifest's JSON and makes its hash fit again: what only an attacker would do."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    text = json.dumps(data).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest() + "\n")


def _zip(folder: Path, target: Path, change=None) -> Path:
    """Packs a folder without any check; `change` gets the open archive."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
        if change is not None:
            change(archive)
    return target


def test_opens_a_folder(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        assert opened.manifest.name == "tiny"
        assert opened.path("model.onnx") == bundle / "model.onnx"
        cases = opened.golden()
    assert len(cases) == 4 and cases[0].inputs["x"].shape == (12, 3, 6, 6)
    assert cases[0].thresholds.dtype == np.float32 and cases[0].margin.shape == (12,)


def test_opens_a_zip_and_removes_its_folder(bundle: Path, tmp_path: Path) -> None:
    pack_zip(bundle, tmp_path / "bundle.zip")
    with open_bundle(tmp_path / "bundle.zip") as opened:
        folder = opened.folder
        assert folder != bundle and opened.path("golden.npz").is_file()
        assert len(opened.golden()) == 4
    assert not folder.exists()


def test_a_zip_and_its_folder_are_one_bundle(bundle: Path, tmp_path: Path) -> None:
    pack_zip(bundle, tmp_path / "a.zip")
    os.utime(bundle / "model.onnx", (1, 1))
    pack_zip(bundle, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with open_bundle(bundle) as one, open_bundle(tmp_path / "a.zip") as other:
        assert one.sha256 == other.sha256 and one.manifest == other.manifest


def test_writing_a_manifest_twice_gives_equal_bytes(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with open_bundle(bundle) as opened:
        written = write_manifest(bundle, dataclasses.replace(opened.manifest, files={}))
    assert (bundle / "manifest.json").read_bytes() == before
    assert set(written.files) == {"model.onnx", "golden.npz"}


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "manifest.json", "manifest.sha256"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_altered_file_is_named(bundle: Path, tmp_path: Path, name: str, packed: bool) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    path = _zip(bundle, tmp_path / "b.zip") if packed else bundle
    with pytest.raises(BundleError, match=rf"{name} differs from the manifest's sha256"):
        open_bundle(path)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_or_longer_file_is_named(bundle: Path, tmp_path: Path, change: int, packed: bool) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[:change] if change < 0 else data + b"\0")
    path = _zip(bundle, tmp_path / "b.zip") if packed else bundle
    with pytest.raises(BundleError, match=r"model\.onnx .*bytes"):
        open_bundle(path)


@pytest.mark.parametrize("packed", [False, True])
def test_an_altered_manifest_is_refused_before_it_is_parsed(
    bundle: Path, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "manifest.json").write_bytes(b"not even json")
    monkeypatch.setattr(Manifest, "from_json", lambda text: pytest.fail("parsed before its hash was checked"))
    path = _zip(bundle, tmp_path / "b.zip") if packed else bundle
    with pytest.raises(BundleError, match=r"manifest\.json differs from manifest\.sha256"):
        open_bundle(path)


@pytest.mark.parametrize("packed", [False, True])
def test_an_extra_file_is_named(bundle: Path, tmp_path: Path, packed: bool) -> None:
    (bundle / "notes.txt").write_text("hello")
    path = _zip(bundle, tmp_path / "b.zip") if packed else bundle
    with pytest.raises(BundleError, match=r"'notes\.txt'.*not list"):
        open_bundle(path)


def test_files_in_subfolders_belong_to_the_listing(bundle: Path, tmp_path: Path) -> None:
    (bundle / "text").mkdir()
    (bundle / "text" / "tokens.json").write_text("{}")
    with pytest.raises(BundleError, match="text/tokens"):
        open_bundle(bundle)
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_manifest(bundle, manifest)
    pack_zip(bundle, tmp_path / "b.zip")
    with open_bundle(tmp_path / "b.zip") as opened:
        assert opened.path("text/tokens.json").read_text() == "{}"


def test_a_symlink_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"symlink 'model\.onnx'"):
        open_bundle(bundle)
    with pytest.raises(BundleError, match="symlink"):
        write_manifest(bundle, Manifest.from_json((bundle / "manifest.json").read_text()))


def test_a_symlinked_folder_and_a_pipe_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "linked").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="symlink 'linked'"):
        open_bundle(bundle)
    (bundle / "linked").unlink()
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError, match="'pipe', which is no plain file"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "c:\\x", "a\\b", "./x", "a//b", ""])
def test_a_manifest_that_leaves_the_folder_is_refused(bundle: Path, name: str) -> None:
    _seal(bundle, lambda data: data["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="may leave the bundle's folder"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    ["NUL", "aux.txt", "a/COM1.onnx", "con ", "model.onnx.", "model.onnx ", "a./b", "a?b", "x\x1b[2J"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_name_that_is_another_file_elsewhere_is_refused(
    bundle: Path, tmp_path: Path, name: str, packed: bool
) -> None:
    _seal(bundle, lambda data: data["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    path = _zip(bundle, tmp_path / "b.zip", lambda archive: archive.writestr(name, "x")) if packed else bundle
    with pytest.raises(BundleError, match="no file name on every system"):
        open_bundle(path)


@pytest.mark.parametrize("packed", [False, True])
def test_two_names_that_differ_in_case_only_are_refused(bundle: Path, tmp_path: Path, packed: bool) -> None:
    (bundle / "Model.onnx").write_bytes(b"x")
    path = _zip(bundle, tmp_path / "b.zip") if packed else bundle
    with pytest.raises(BundleError, match="are one file on some systems"):
        open_bundle(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_packed_otherwise_are_refused(bundle: Path, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in bundle.iterdir():
            archive.write(file, file.name, method if file.name == "golden.npz" else zipfile.ZIP_STORED)
    with pytest.raises(BundleError, match=r"'golden\.npz' neither stored nor deflated"):
        open_bundle(tmp_path / "b.zip")


def test_a_zip_with_a_name_that_is_no_utf8_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = _zip(bundle, tmp_path / "b.zip", lambda archive: archive.writestr("größe", "x"))
    path.write_bytes(path.read_bytes().replace("größe".encode(), b"gr\xff\xff\xff\xffe"))
    with pytest.raises(BundleError, match="readable zip"):
        open_bundle(path)


def test_damage_anywhere_in_a_zip_is_a_bundle_error(bundle: Path, tmp_path: Path) -> None:
    """Whatever is wrong with the bytes, a stranger sees one of our errors and no temporary folder stays."""
    path = _zip(bundle, tmp_path / "b.zip")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    directory = data.index(b"PK\x01\x02")
    opened = 0
    for place in [*rng.integers(directory, len(data), 40).tolist(), *rng.integers(0, directory, 20).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            open_bundle(path).close()
            opened += 1  # dates and the like do not matter
        except InputError:
            pass
    assert opened < 40


def test_a_file_of_a_bundle_is_not_the_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"it is a part of the bundle .*, give that folder"):
        open_bundle(bundle / "model.onnx")


def test_a_folder_without_a_manifest_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "deep").mkdir(parents=True)
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("walked through a folder that is no bundle"))
    with pytest.raises(BundleError, match=r"has no manifest\.json: this is no bundle"):
        open_bundle(tmp_path / "home")
    (tmp_path / "home" / "deep" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=r"it lies in 'deep/manifest\.json', use that folder"):
        open_bundle(tmp_path / "home")


def test_a_folder_that_cannot_be_listed_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BundleError, match=r"cannot read the bundle .*Permission denied"):
        open_bundle(bundle)


def test_a_failed_or_doubled_write_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "b.zip"
    target.parent.mkdir()
    pack_zip(bundle, target)
    before = target.read_bytes()
    with pytest.raises(RuntimeError), replaced(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]
    with replaced(target) as first, replaced(target) as second:
        first.write_bytes(b"1")
        second.write_bytes(b"2")
    assert target.read_bytes() == b"1" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "..\\outside.txt"])
def test_zip_slip_is_refused_and_writes_nothing(bundle: Path, tmp_path: Path, name: str) -> None:
    path = _zip(bundle, tmp_path / "b.zip", lambda archive: archive.writestr(name, "x"))
    with pytest.raises(BundleError, match="may leave the bundle's folder"):
        open_bundle(path)
    assert not list(tmp_path.glob("**/outside.txt"))


def test_zip_entries_that_are_doubled_linked_or_encrypted_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        path = _zip(bundle, tmp_path / "a.zip", lambda archive: archive.writestr("model.onnx", "x"))
    with pytest.raises(BundleError, match=r"'model\.onnx' twice"):
        open_bundle(path)

    def link(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")

    with pytest.raises(BundleError, match="symlink 'link'"):
        open_bundle(_zip(bundle, tmp_path / "b.zip", link))

    path = _zip(bundle, tmp_path / "c.zip")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the encryption bit of the last entry in the directory
    path.write_bytes(data)
    with pytest.raises(BundleError, match="encrypted"):
        open_bundle(path)


def test_a_zip_bomb_stops_at_the_size_in_the_manifest(bundle: Path, tmp_path: Path) -> None:
    (bundle / "golden.npz").write_bytes(b"\0" * 50_000_000)
    path = _zip(bundle, tmp_path / "b.zip")
    assert path.stat().st_size < 200_000
    with pytest.raises(BundleError, match=r"golden\.npz unpacks to more than the manifest's"):
        open_bundle(path)


def test_a_manifest_that_asks_for_more_than_the_disk_is_refused(bundle: Path, tmp_path: Path) -> None:
    _seal(bundle, lambda data: data["files"]["model.onnx"].update(bytes=10**18))
    with pytest.raises(InputError, match="free: set TMPDIR"):
        open_bundle(_zip(bundle, tmp_path / "b.zip"))


def test_a_folder_packed_with_its_own_name_is_explained(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in bundle.iterdir():
            archive.write(file, f"bundle/{file.name}")
    with pytest.raises(BundleError, match=r"it lies in 'bundle/manifest\.json'"):
        open_bundle(tmp_path / "b.zip")


def test_a_damaged_zip_entry_is_named(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    pack_zip(bundle, path)
    data = bytearray(path.read_bytes())
    data[data.index((bundle / "model.onnx").read_bytes()[:64]) + 32] ^= 255
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        open_bundle(path)


def test_not_a_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(BundleError, match="neither a folder nor a readable zip"):
        open_bundle(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=99), "schema_version 99, this runtime reads 1 and 2"),
        (lambda data: data.pop("schema_version"), "schema_version None"),
        (lambda data: data.update(answer=[]), "unknown field 'answer'.*did you mean 'answers'"),
        (lambda data: data.pop("answers"), "lacks the field 'answers'"),
        (
            lambda data: data["answers"][0].update(kind="sounds"),
            "'label' has the kind 'sounds'.*classes, exits",
        ),
        (lambda data: data.update(batch=3), "batch should be str"),
        (lambda data: data["inputs"][0].update(shape=[1.5]), "shape"),
    ],
)
def test_a_manifest_of_another_form_is_refused(bundle: Path, change, message: str) -> None:
    _seal(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["answers"][0]["labels"].pop(),
            r"labels has 3 names and the output 'scores' is 4 wide \(shape \[1, 4\]\)",
        ),
        (lambda data: data["answers"][0]["labels"].append("elk"), "labels has 5 names"),
        (
            lambda data: data["answers"][0]["labels"].__setitem__(3, data["answers"][0]["labels"][0]),
            "labels has '.*' twice",
        ),
        (lambda data: data["inputs"][0].update(dtype="flaot32"), "input 'x' has the dtype 'flaot32'"),
        (lambda data: data["inputs"][0].update(shape=[1, 0]), r"'x' has the shape \[1, 0\]"),
        (lambda data: data.update(inputs=[]), "inputs is empty"),
        (lambda data: data["outputs"].append(data["outputs"][0]), "outputs names 'label' twice"),
        (lambda data: data["outputs"].pop(), "exit policy and no output 'exit_index'"),
        (lambda data: data["exits"].pop(0), r"numbered \[1, 2\]"),
        (lambda data: data["exits"].pop(), "has 2 thresholds for 1 early exits"),
        (lambda data: data.update(exits=data["exits"][:1]), "an exit policy and 1 exits"),
        (
            lambda data: data["operating_points"][1].update(thresholds=[0.5, 3]),
            r"'deep': the threshold of exit 1 \(body1\), 3 lies outside the range",
        ),
        (lambda data: data["preprocessing"].update(kind="video"), "kind 'video'"),
        (lambda data: data["preprocessing"].update(size=[0, 6]), "images of"),
        (lambda data: data["preprocessing"].update(mean=[0.5]), "mean has 1 values for 3"),
        (lambda data: data["preprocessing"].update(std=[1, 0, 1]), "standard deviation of 0"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle: Path, change, message: str) -> None:
    _seal(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)
    with pytest.raises(BundleError, match=message):
        write_manifest(bundle, Manifest.from_json((bundle / "manifest.json").read_text()))


def test_labels_are_held_to_the_width_of_logits_too(flat_bundle: Path) -> None:
    _seal(flat_bundle, lambda data: data["answers"][0]["labels"].pop())
    with pytest.raises(BundleError, match="labels has 3 names and the output 'logits' is 4 wide"):
        open_bundle(flat_bundle)
    _seal(flat_bundle, lambda data: data["answers"][0].update(labels=[]))
    open_bundle(flat_bundle)


def test_manifest_json_round_trip(make_manifest) -> None:
    manifest = make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"torch_abs": 0.0001', '"torch_abs": 1e999', "1e999 is no finite number"),
        ('"batch": "single"', '"batch": "single", "batch": "dynamic"', "the key 'batch' stands twice"),
    ],
)
def test_numbers_and_keys_that_readers_understand_differently_are_refused(
    make_manifest, old: str, new: str, message: str
) -> None:
    text = make_manifest().to_json()
    assert old in text
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text.replace(old, new))


@pytest.mark.parametrize("text", ["[]", "{", '{"schema_version": NaN}', "[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_a_huge_manifest_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MANIFEST_LIMIT_BYTES", 100)
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        open_bundle(bundle)


def test_golden_bytes_depend_on_the_cases_only(tmp_path: Path) -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2])
    write_golden(tmp_path / "a.npz", [GoldenCase({"x": x, "m": y}, {"o": y}, {})])
    write_golden(tmp_path / "b.npz", [GoldenCase({"m": y, "x": np.asfortranarray(x)}, {"o": y}, {})])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.load(tmp_path / "a.npz")["0000/input/x"].tolist() == x.tolist()


def test_golden_round_trip_keeps_every_case(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/b.c": np.array(7, np.int64),
        "half": np.ones((0, 2), np.float16),
    }
    cases = [GoldenCase(arrays, {"o": np.arange(i)}, {"o": np.arange(i)}) for i in range(1, 13)]
    cases.append(dataclasses.replace(cases[0], thresholds=[0.5], margin=[0.1, 0.2]))
    write_golden(tmp_path / "g.npz", cases)
    read = read_golden(tmp_path / "g.npz")
    assert len(read) == 13 and [len(case.torch["o"]) for case in read[:12]] == list(range(1, 13))
    for name, value in arrays.items():
        assert read[3].inputs[name].dtype == value.dtype and read[3].inputs[name].shape == value.shape
    assert read[0].thresholds is None and read[12].margin.tolist() == np.float32([0.1, 0.2]).tolist()


def test_golden_refuses_objects_and_empty_cases(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Python objects"):
        write_npz(tmp_path / "o.npz", {"x": np.array([{}])})
    with pytest.raises(InputError, match="at least one case"):
        write_golden(tmp_path / "g.npz", [])
    with pytest.raises(InputError, match="needs inputs and expected outputs"):
        write_golden(tmp_path / "g.npz", [GoldenCase({"x": np.ones(1)}, {}, {})])


def test_reading_an_npz_is_bounded_and_unpickles_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="pickled Python objects"):
        read_npz(tmp_path / "pickled.npz")
    np.savez_compressed(tmp_path / "big.npz", x=np.zeros(1_000_000))
    with pytest.raises(InputError, match="more than the 1000"):
        read_npz(tmp_path / "big.npz", limit_bytes=1000)
    # A header that asks for far more memory than the entry holds must not be believed.
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        header += b" " * (118 - len(header)) + b"\n"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match="holds 0 bytes"):
        read_npz(tmp_path / "liar.npz")
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="not a readable"):
        read_npz(tmp_path / "no.npz")


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 9000,
        b"{'a':\n  'b'\n c",
        b"\xff\xfe",
        b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1" + b"0" * 21 + b"), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 70 + b"), }",
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_that_are_none_are_refused(tmp_path: Path, header: bytes, version: int) -> None:
    header += b"\n"
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY" + bytes([version, 0]) + size + header + b"\0" * 4)
    with pytest.raises(InputError, match=r"x\.npz:x\.npy"):
        read_npz(tmp_path / "x.npz")


def test_an_npz_with_one_array_twice_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones(1))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("x.npy", archive.read("x.npy"))
    with pytest.raises(InputError, match="one array twice"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("key", ["x", "0000/other/x", "0001/input/x", "00000/input/x"])
def test_golden_with_a_foreign_key_or_a_gap_is_refused(tmp_path: Path, key: str) -> None:
    write_npz(tmp_path / "g.npz", {key: np.ones(1)})
    with pytest.raises(BundleError, match="export"):
        read_golden(tmp_path / "g.npz")


def _as_links(bundle: Path, store: Path) -> Path:
    """The bundle as stores of files make it: a folder of links to files that are called by their hash."""
    folder = store / "snapshots" / "abc"
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        blob = store / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = folder / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_a_folder_of_links_is_opened_on_demand(bundle: Path, tmp_path: Path) -> None:
    links = _as_links(bundle, tmp_path / "store")
    with pytest.raises(BundleError, match=r"symlink.*--follow-links.*follow_links=True.*zip"):
        open_bundle(links)
    with open_bundle(links, follow_links=True) as opened:
        folder = opened.folder
        assert folder != links and not any(path.is_symlink() for path in folder.rglob("*"))
        assert verify(opened).passed
    assert not folder.exists()
    with open_bundle(bundle, follow_links=True) as opened:
        assert opened.folder == bundle


def test_a_linked_folder_counts_as_its_files(bundle: Path, tmp_path: Path) -> None:
    (bundle / "more").mkdir()
    (bundle / "more" / "weights.data").write_bytes(b"1234")
    write_manifest(bundle, Manifest.from_json((bundle / "manifest.json").read_text()))
    (bundle / "more").rename(tmp_path / "elsewhere")
    (bundle / "more").symlink_to(tmp_path / "elsewhere")
    with open_bundle(bundle, follow_links=True) as opened:
        assert opened.path("more/weights.data").read_bytes() == b"1234"


@pytest.mark.parametrize("what", ["altered", "dangling", "device", "fifo", "loop", "loops"])
def test_links_are_held_to_the_same_rules(bundle: Path, tmp_path: Path, what: str) -> None:
    links = _as_links(bundle, tmp_path / "store")
    model = links / "model.onnx"
    if what == "altered":
        blob = model.resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    elif what == "loops":
        for name in "ab":
            (links / name).symlink_to(links)
    else:
        os.mkfifo(tmp_path / "fifo")
        model.unlink()
        targets = {"dangling": "gone", "device": "/dev/zero", "fifo": tmp_path / "fifo", "loop": "model.onnx"}
        model.symlink_to(targets[what])
    with pytest.raises(BundleError):
        open_bundle(links, follow_links=True)


ODD = [
    ("COM¹",),
    ("lpt².txt",),
    ("CONIN$",),
    ("conout$.log",),
    ("caf\u00e9.txt", "cafe\u0301.txt"),
    ("Folder/a", "folder/b"),
    ("a" * 241,),
    ("/".join("a" * 40),),
]


@pytest.mark.parametrize("names", ODD)
def test_names_that_not_every_system_takes_are_refused(bundle: Path, names: tuple[str, ...]) -> None:
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    for name in names:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"x")
    files = dict.fromkeys(names, FileEntry(1, hashlib.sha256(b"x").hexdigest()))
    changed = dataclasses.replace(manifest, files={**manifest.files, **files}).to_json()
    _seal(bundle, lambda data: data.update(json.loads(changed)))
    with pytest.raises(BundleError, match="system"):
        open_bundle(bundle)


@pytest.mark.parametrize("names", [*ODD, ("/".join("a" * 2001),)])
def test_names_in_a_zip_that_not_every_system_takes_are_refused(
    bundle: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    with pytest.raises(BundleError, match="system"):
        open_bundle(_zip(bundle, tmp_path / "b.zip", lambda archive: [archive.writestr(n, b"x") for n in names]))


@pytest.mark.parametrize("digits", [21, 400, 5000])
@pytest.mark.parametrize("field", ["opset", "tolerances"])
def test_a_number_of_many_digits_is_bad_input(bundle: Path, digits: int, field: str) -> None:
    text = (bundle / "manifest.json").read_text()
    old = {"opset": '"opset": 20', "tolerances": '"reference_abs": 0.0001'}[field]
    assert old in text
    changed = text.replace(old, old.split()[0] + " " + "9" * digits).encode()
    (bundle / "manifest.json").write_bytes(changed)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(changed).hexdigest())
    with pytest.raises(BundleError, match=f"{digits} digits"):
        open_bundle(bundle)


def _swap_by_rename(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


@pytest.mark.parametrize("swap", [_swap_by_rename, Path.write_bytes])
@pytest.mark.parametrize("source", ["folder", "zip"])
def test_a_model_that_is_swapped_after_opening_does_not_run(bundle: Path, tmp_path: Path, swap, source: str) -> None:
    pack_zip(bundle, tmp_path / "b.zip")
    with open_bundle(bundle if source == "folder" else tmp_path / "b.zip") as opened:
        path = opened.path("model.onnx")
        data = path.read_bytes()
        assert b"body2.weight" in data
        swap(path, data.replace(b"body2.weight", b"body9.weight"))  # as large, and a model as well
        with pytest.raises(BundleError, match=r"'model\.onnx' was altered since"):
            load(opened)
        with pytest.raises(BundleError, match=r"'model\.onnx' was altered since"):
            verify(opened)
        if source == "folder":
            with pytest.raises(BundleError, match=r"'model\.onnx' was altered since"):
                bench(opened, min_seconds=0.01, min_samples=1)
        swap(path, data)
        load(opened).close()
        opened.path("golden.npz").write_bytes(b"x")
        with pytest.raises(BundleError, match=r"'golden\.npz' was altered since"):
            opened.golden()


def test_a_model_that_is_swapped_while_it_is_loaded_does_not_run(bundle: Path) -> None:
    with open_bundle(bundle) as opened, pytest.raises(BundleError, match="altered"), opened.unchanged(["model.onnx"]):
        opened.path("model.onnx").write_bytes(opened.path("model.onnx").read_bytes()[:-1] + b"\0")


def test_an_old_file_is_not_read_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewright.edge_runtime.bundle.seal._COARSEST_NS", -(1 << 62))
    with open_bundle(bundle) as opened:

        def refuse(*_: object) -> str:
            raise AssertionError

        monkeypatch.setattr("edgewright.edge_runtime.bundle.bundle.file_sha256", refuse)
        load(opened).close()


def test_a_path_that_is_no_text_is_refused(bundle: Path, tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(bundle, place)
    with pytest.raises(InputError, match=r"not UTF-8 text, .*caf\\udce9: rename it"):
        open_bundle(place)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "manifest.json", "split/level0.onnx"])
def test_a_part_of_a_bundle_leads_to_its_bundle(bundle: Path, name: str) -> None:
    part = bundle / name
    if not part.exists():
        part.parent.mkdir()
        part.write_bytes(b"\x08\x0a")
    with pytest.raises(BundleError, match=f"a part of the bundle {re.escape(str(bundle))}, give that folder"):
        open_bundle(part)


@pytest.mark.parametrize("name", ["net.onnx", "NET.ONNX", "net.onnx.data"])
def test_an_onnx_file_alone_is_called_that(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(BundleError, match=r"an ONNX file and no bundle.*folder or the zip of the export") as caught:
        open_bundle(tmp_path / name)
    assert "copy it again" not in str(caught.value) and "interleaved" in str(caught.value)
