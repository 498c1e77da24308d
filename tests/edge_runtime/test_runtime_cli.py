from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import edgewright.edge_runtime as edge_runtime
from edgewright.edge_runtime import InputError, cli, open_bundle, pack_zip, write_manifest, write_runtime_archive
from edgewright.edge_runtime.answers.text import result_dict, result_lines
from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.edge_runtime.errors import EdgewrightError

SOURCE = Path(edge_runtime.__file__).parents[2]


def _run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd
    )


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyz") / "edge_runtime.pyz"
    write_runtime_archive(path)
    return path


def test_verify(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle), "--json", str(tmp_path / "v.json")]) == 0
    assert "tiny: verified" in capsys.readouterr().out
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is True


def test_verify_that_fails_exits_3(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgewright.edge_runtime import open_bundle, write_golden

    with open_bundle(bundle) as opened:
        cases, manifest = opened.golden(), opened.manifest
    cases[0].torch["scores"] = cases[0].torch["scores"] + 1
    write_golden(bundle / "golden.npz", cases)
    write_manifest(bundle, manifest)
    assert cli.main(["verify", str(bundle)]) == 3
    assert "FAILED: case 0000, against torch, output 'scores'" in capsys.readouterr().out


def test_predict(bundle: Path, tmp_path: Path, rows: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", rows)
    np.savez(tmp_path / "x.npz", x=rows)
    json_path = tmp_path / "p.json"
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy"), "--json", str(json_path)]) == 0
    first = capsys.readouterr().out
    assert re.match(r"row 0: (ant|bee|cat|dog)  score 0\.\d{4}  exit [012] \((body[01]|final)\)\n", first)
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npz")]) == 0
    assert capsys.readouterr().out == first
    data = json.loads(json_path.read_text())
    assert len(data["scores"]) == 3 and data["schema_version"] == 1
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy"), "--thresholds", "2,0"]) == 0
    assert capsys.readouterr().out.count("exit 1") == 3
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy"), "--operating-point", "deep"]) == 0
    assert capsys.readouterr().out.count("exit 2") == 3


def test_predict_reports_the_rows_that_it_refuses(bundle: Path, tmp_path: Path, rows: np.ndarray, capsys) -> None:
    rows[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", rows)
    json_path = tmp_path / "p.json"
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy"), "--json", str(json_path)]) == 2
    caught = capsys.readouterr()
    lines = caught.out.splitlines()
    assert lines[1] == "row 1: refused: input 'x', row 1: nan at [0, 0, 0]"
    assert "score" in lines[0] and "score" in lines[2]
    assert f"{tmp_path / 'x.npy'}: 1 of 3 rows were refused" in caught.err
    data = json.loads(json_path.read_text())
    assert data["scores"][1] == [None] * 4 and data["scores"][0][0] is not None
    assert data["label"][1] == -1 and data["score_kinds"][1] == "none" and list(data["refused"]) == ["1"]
    np.save(tmp_path / "one.npy", rows[1])
    assert cli.main(["predict", str(bundle), str(tmp_path / "one.npy")]) == 2
    caught = capsys.readouterr()
    assert caught.out == "" and "error: input 'x', row 0: nan at [0, 0, 0]" in caught.err


def test_an_exit_by_exclusion_prints_no_probability(bundle: Path, tmp_path: Path, rows, capsys) -> None:
    from edgewright.edge_runtime import Prediction

    scores = np.array([[0, 1, 0, 0], [0.25, 0.75, 0, 0], [0.1, 0.2, 0.3, 0.4]], np.float32)
    labels, exits = ("ant", "b\x1b[2Jee", "cat", "dog"), ("body0", "final")
    prediction = Prediction(np.array([1, 1, 3]), scores, np.array([0, 1, 1]), labels, exits, True)
    assert result_lines({"label": prediction}) == [
        "row 0: b\\x1b[2Jee  decided by exclusion of every other class, no probability  exit 0 (body0)",
        "row 1: b\\x1b[2Jee  score 0.7500 among the 2 classes not excluded  exit 1 (final)",
        "row 2: dog  score 0.4000  exit 1 (final)",
    ]
    data = result_dict({"label": prediction})
    assert data["score_kinds"] == ["exclusion", "probability_of_remaining", "probability"]
    assert data["exit_names"] == ["body0", "final", "final"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"1 2 3\n", "is neither a .npy nor a .npz file: save the input with numpy.save"),
        ("x.npy", b"1 2 3\n", "is neither a .npy nor a .npz file"),
        ("x.npz", b"", "x.npz is empty: save"),
        ("x.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "is not a complete .npy file"),
        ("x.bin", b"PK\x03\x04 and nothing more", "is not a readable .npz"),
    ],
)
def test_an_input_of_another_format_is_named(
    bundle: Path, tmp_path: Path, capsys, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert cli.main(["predict", str(bundle), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert name in error and message in error and "pickle" not in error


def test_an_input_of_python_objects_or_under_another_name(bundle: Path, tmp_path: Path, rows, capsys) -> None:
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy")]) == 2
    assert "holds pickled Python objects, which are never read" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", x=rows)
    (tmp_path / "x.npz").rename(tmp_path / "X.NPZ")
    assert cli.main(["predict", str(bundle), str(tmp_path / "X.NPZ")]) == 0
    assert cli.main(["predict", str(bundle), str(tmp_path)]) == 2
    assert "no input at" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--samples-file"])
def test_results_are_not_written_into_the_bundle_and_not_lost(bundle: Path, tmp_path: Path, capsys, option) -> None:
    before = sorted(bundle.iterdir())
    for path, message in ((bundle / "r", "lies in the bundle"), (tmp_path / "no" / "r", "there is no folder")):
        assert cli.main(["bench", str(bundle), option, str(path)]) == 2
        caught = capsys.readouterr()
        assert message in caught.err and caught.out == ""  # before anything was measured
    assert sorted(bundle.iterdir()) == before


def test_a_reader_that_has_seen_enough_is_no_error(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2000, 3, 6, 6), np.float32))
    command = f"{sys.executable} -m edgewright.edge_runtime predict {bundle} {tmp_path / 'x.npy'} | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("row 0: ") and done.stderr == ""


def test_a_label_that_the_terminal_cannot_show(bundle: Path, tmp_path: Path) -> None:
    from edgewright.edge_runtime import open_bundle

    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    answers = (AnswerSpec("label", "exits", tuple(f"größe {i}" for i in range(4))),)
    write_manifest(bundle, dataclasses.replace(manifest, answers=answers))
    np.save(tmp_path / "x.npy", np.ones((1, 3, 6, 6), np.float32))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "edgewright.edge_runtime", "predict", bundle, tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("row 0: gr\\xf6\\xdfe ")


def test_predict_an_image(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    images.fromarray(pixels).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", pixels)
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.png")]) == 0
    from_image = capsys.readouterr().out
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out == from_image
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert cli.main(["predict", str(bundle), str(tmp_path / "bad.png")]) == 2
    assert cli.main(["predict", str(bundle), str(tmp_path / "none.png")]) == 2


def test_an_image_for_a_bundle_without_preprocessing(flat_bundle: Path, tmp_path: Path, capsys) -> None:
    images = pytest.importorskip("PIL.Image")
    images.new("RGB", (6, 6)).save(tmp_path / "x.png")
    assert cli.main(["predict", str(flat_bundle), str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "does not say how images become its input" in error and "astype" not in error


def test_an_image_without_pillow(bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.png")]) == 2
    assert "needs Pillow" in capsys.readouterr().err


def test_bench(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(bundle), "--threads", "1", "--min-seconds", "0.1", "--min-samples", "70"]
    files = ["--json", str(tmp_path / "b.json"), "--samples-file", str(tmp_path / "s.npy")]
    assert cli.main([*arguments, *files]) == 0
    assert "95 % interval" in capsys.readouterr().out
    row = json.loads((tmp_path / "b.json").read_text())
    assert row["session"]["intra"] == 1 and row["samples_file"] == "s.npy"


def test_every_command_takes_an_operating_point_by_either_option(bundle: Path, tmp_path: Path, rows, capsys) -> None:
    np.save(tmp_path / "x.npy", rows[:1])
    commands = [
        ["verify", str(bundle)],
        ["predict", str(bundle), str(tmp_path / "x.npy")],
        ["bench", str(bundle), "--min-seconds", "0", "--min-samples", "3"],
    ]
    for command in commands:
        assert cli.main([*command, "--thresholds", "deep"]) == 0, command
        out = capsys.readouterr().out
        assert "exit 2" in out or "12 rows" in out
        for option in ("--thresholds", "--operating-point"):
            assert cli.main([*command, option, "depe"]) == InputError.exit_code
            assert "did you mean 'deep'? the bundle has default, deep" in capsys.readouterr().err
        assert cli.main([*command, "--thresholds", "0.5"]) == InputError.exit_code
        assert "has 2 thresholds, got 1" in capsys.readouterr().err
        assert cli.main([*command, "--thresholds", "deep", "--operating-point", "deep"]) == InputError.exit_code
        assert "not both" in capsys.readouterr().err
        assert cli.main([*command, "--layout", "split"]) == InputError.exit_code
        assert "export it with `export: {split: true}`" in capsys.readouterr().err
    assert cli.main([*commands[0], "--thresholds", "0.75,0.75"]) == InputError.exit_code
    assert "verify an operating point (default, deep)" in capsys.readouterr().err


def test_latency_table(bundle: Path, flat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["latency-table", str(bundle), "--threads", "1", "--blocks", "3", "--block-runs", "2"]
    out = tmp_path / "measured.zip"
    assert cli.main([*command, "--json", str(tmp_path / "table.json"), "--record", str(out)]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["exits"]) == 3 and min(table["exits"]) > 0 and table["split_over_file"] is None
    assert table["exit_names"] == ["body0", "body1", "final"] and table["device"] in capsys.readouterr().out
    with open_bundle(out) as recorded:
        (entry,) = recorded.manifest.measured
    assert entry.exits_us == {"file": tuple(table["exits"])} and entry.device == table["device"]
    assert cli.main([*command, "--record", str(out)]) == InputError.exit_code
    assert "it exists" in capsys.readouterr().err
    assert cli.main([*command, "--record", str(bundle / "b")]) == InputError.exit_code
    assert "immutable" in capsys.readouterr().err
    both = str(tmp_path / "both")
    assert cli.main([*command, "--record", both, "--json", both]) == InputError.exit_code
    assert "cannot write two results" in capsys.readouterr().err
    assert cli.main(["latency-table", str(flat_bundle)]) == InputError.exit_code
    assert "no early exits" in capsys.readouterr().err


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json", str(tmp_path / "d.json")])
    assert json.loads((tmp_path / "d.json").read_text())["ok"] is (code == 0)
    assert onnxruntime.__version__ in capsys.readouterr().out


def test_errors_are_one_line_and_a_code(bundle: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    assert cli.main(["verify", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no bundle at") and len(error.splitlines()) == 1
    with pytest.raises(InputError):
        cli.main(["verify", str(tmp_path / "none"), "--debug"])
    assert cli.main(["verify", str(bundle), "--json", str(tmp_path / "no" / "v.json")]) == 2
    assert "cannot write" in capsys.readouterr().err

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("edgewright.edge_runtime.proof.verification.verify", broken)
    assert cli.main(["verify", str(bundle)]) == EdgewrightError.exit_code == 1
    assert "internal error: RuntimeError: a bug; run again with --debug" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["verfy"], ["predict", "b"], ["bench", "b", "--thresholds", "0.5,x"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_without_onnxruntime_the_message_says_so(bundle: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr("edgewright.edge_runtime.proof.verification.verify", missing)
    assert cli.main(["verify", str(bundle)]) == 5
    assert "onnxruntime is not installed" in capsys.readouterr().err


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers() and shutil.which("nvidia-smi") is not None,
    reason="needs a machine without CUDA",
)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_exits_5_or_falls_back_loudly(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], provider: str
) -> None:
    full = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    assert cli.main(["verify", str(bundle), "--provider", provider]) == 5
    error = capsys.readouterr().err
    assert f"{full} was asked for" in error and "Traceback" not in error
    json_path = tmp_path / "v.json"
    options = ["--provider", provider, "--allow-fallback", "--json", str(json_path)]
    assert cli.main(["verify", str(bundle), *options]) == 0
    caught = capsys.readouterr()
    assert caught.err.count(f"warning: {full} was asked for, this runs on CPUExecutionProvider") == 1
    assert f"FALLBACK: {full} " in caught.out
    (reason,) = json.loads(json_path.read_text())["placement"]["fallback"]
    assert reason.startswith(full)
    np.save(tmp_path / "x.npy", np.ones((1, 3, 6, 6), np.float32))
    assert cli.main(["predict", str(bundle), str(tmp_path / "x.npy"), *options]) == 0
    assert f"warning: {full} was asked for" in capsys.readouterr().err
    quick = ["--min-seconds", "0", "--min-samples", "40"]
    assert cli.main(["bench", str(bundle), *options, *quick]) == 0
    caught = capsys.readouterr()
    assert f"warning: {full} was asked for" in caught.err and f"FALLBACK: {full} " in caught.out
    assert json.loads(json_path.read_text())["ep"]["session"] == ["CPUExecutionProvider"]


def test_as_a_module(bundle: Path) -> None:
    done = _run("-m", "edgewright.edge_runtime", "verify", bundle)
    assert done.returncode == 0, done.stderr
    assert "tiny: verified" in done.stdout
    done = _run("-m", "edgewright.edge_runtime", "verify", bundle / "none")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_imports_neither_numpy_nor_onnxruntime() -> None:
    code = (
        "import sys; from edgewright.edge_runtime import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('numpy', 'onnxruntime') if name in sys.modules])"
    )
    assert _run("-c", code).stdout.splitlines()[-1] == "[]"


def test_the_package_imports_nothing_but_numpy_and_onnxruntime() -> None:
    # What a bare numpy + onnxruntime import brings along is theirs; everything beyond it would be ours.
    code = """
import json, sys
import numpy, onnxruntime
before = set(sys.modules)
import edgewright.edge_runtime as package
for name in package.__all__:
    getattr(package, name)
import edgewright.edge_runtime.cli
tops = {name.split('.')[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(tops - set(sys.stdlib_module_names) - {'edgewright'})))
print(json.dumps(sorted(
    name for name in ('torch', 'onnx', 'typer', 'rich', 'pydantic', 'yaml') if name in sys.modules)))
"""
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    beyond, forbidden = map(json.loads, done.stdout.splitlines())
    assert set(beyond) <= {"numpy", "onnxruntime"} and forbidden == []


def test_all_is_what_can_be_imported() -> None:
    for name in edge_runtime.__all__:
        assert getattr(edge_runtime, name) is not None
    assert sorted(edge_runtime.__all__) == edge_runtime.__all__ == sorted(edge_runtime._WHERE)
    assert set(edge_runtime.__all__) <= set(dir(edge_runtime))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        edge_runtime.nothing_like_this  # noqa: B018


class TestArchive:
    def test_bytes_depend_on_the_sources_only(self, pyz: Path, tmp_path: Path) -> None:
        write_runtime_archive(tmp_path / "again.pyz")
        assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()

    def test_verify_and_predict_in_isolation(self, pyz: Path, bundle: Path, tmp_path: Path, rows) -> None:
        pack_zip(bundle, tmp_path / "b.zip")
        done = _run("-I", pyz, "verify", tmp_path / "b.zip", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "tiny: verified" in done.stdout
        np.save(tmp_path / "x.npy", rows)
        done = _run("-I", pyz, "predict", bundle, tmp_path / "x.npy", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("row 0: ")

    def test_bench_starts_its_child_from_inside_the_archive(self, pyz: Path, bundle: Path, tmp_path: Path) -> None:
        json_path = tmp_path / "b.json"
        options = ["--min-seconds", "0", "--min-samples", "20", "--json", json_path]
        done = _run("-I", pyz, "bench", bundle, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(json_path.read_text())["status"] == "ok"

    def test_it_records_a_measurement_and_itself(self, pyz: Path, bundle: Path, tmp_path: Path) -> None:
        with open_bundle(bundle) as opened:
            manifest = opened.manifest
        (bundle / "edge_runtime.pyz").write_bytes(b"an older release")
        write_manifest(bundle, manifest)
        options = ["--blocks", "2", "--block-runs", "1", "--record", tmp_path / "new"]
        done = _run("-I", pyz, "latency-table", bundle, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "new" / "edge_runtime.pyz").read_bytes() == pyz.read_bytes()
        done = _run("-I", tmp_path / "new" / "edge_runtime.pyz", "verify", tmp_path / "new")
        assert done.returncode == 0, done.stderr

    def test_a_tampered_bundle_exits_2(self, pyz: Path, bundle: Path) -> None:
        with (bundle / "model.onnx").open("ab") as stream:
            stream.write(b"!")
        done = _run("-I", pyz, "verify", bundle)
        assert done.returncode == 2 and "model.onnx has" in done.stderr and "Traceback" not in done.stderr

    def test_it_may_lie_inside_the_bundle(self, pyz: Path, bundle: Path) -> None:
        with open_bundle(bundle) as opened:
            manifest = opened.manifest
        shutil.copy(pyz, bundle / "edge_runtime.pyz")
        assert "edge_runtime.pyz" in write_manifest(bundle, manifest).files
        done = _run("-I", bundle / "edge_runtime.pyz", "verify", bundle)
        assert done.returncode == 0, done.stderr


EVIL = "\x1b[31m\x9b2J\rverified\nrow 9: cat"


def test_no_text_of_a_bundle_steers_the_terminal(
    bundle: Path, tmp_path: Path, rows: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    manifest = dataclasses.replace(
        manifest,
        name=EVIL,
        answers=(AnswerSpec("label", "exits", (EVIL, EVIL + "b", EVIL + "c", EVIL + "d")),),
        exits=tuple(dataclasses.replace(exit_, name=EVIL + str(exit_.index)) for exit_ in manifest.exits),
        operating_points=tuple(
            dataclasses.replace(point, name=point.name + EVIL) for point in manifest.operating_points
        ),
    )
    write_manifest(bundle, manifest)
    np.save(tmp_path / "x.npy", rows)
    quick = ["--min-seconds", "0.01", "--min-samples", "1"]
    for arguments in (
        ["verify"],
        ["predict", str(tmp_path / "x.npy")],
        ["bench", *quick],
        ["bench", *quick, "--layout", "split"],
        ["latency-table", "--blocks", "2", "--block-runs", "1"],
        ["verify", "--operating-point", "none"],
        ["verify", "--thresholds", "0.5,7"],
        ["verify", "--thresholds", "0.5"],
    ):
        cli.main([arguments[0], str(bundle), *arguments[1:]])
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert text and not [c for c in text if not c.isprintable() and c != "\n"], (arguments, text)
        assert not any(line.startswith("row 9") for line in text.splitlines()), arguments


def test_an_error_does_not_steer_the_terminal() -> None:
    assert str(EdgewrightError("a\x1b[2Jb\nc")) == "a\\x1b[2Jb\nc"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--threads", "9" * 400],
        ["verify", "--thresholds", "9" * 400],
        ["bench", "--seed", "-1"],
        ["latency-table", "--seed", "-1"],
        ["latency-table", "--blocks", "9" * 30],
    ],
)
def test_numbers_beyond_reason_are_bad_input(bundle: Path, arguments: list[str]) -> None:
    assert cli.main([arguments[0], str(bundle), *arguments[1:]]) == 2


@pytest.mark.parametrize("ids", ["9" * 400, "9" * 5000, "1,x"])
def test_token_ids_beyond_reason_are_bad_input(ids: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "model", "--ids", ids])
    assert caught.value.code == 2
