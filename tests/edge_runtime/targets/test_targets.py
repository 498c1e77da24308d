from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edgewright.edge_runtime import InputError, doctor
from edgewright.edge_runtime import device as device_module
from edgewright.edge_runtime.bundle.archive import write_runtime_archive
from edgewright.edge_runtime.targets.target import fitting, read_target, target_named, target_names

X86 = frozenset({"fpu", "avx", "avx2"})
MACHINE = {"machine": "x86_64", "onnxruntime": "1.23.0", "providers": ["CPUExecutionProvider"]}


def _text(**changes: Any) -> str:
    return json.dumps({**asdict(target_named("x86")), **changes})


def test_the_targets_that_ship_are_read_and_named_as_their_files() -> None:
    assert target_names() == ("x86", "x86_vnni")
    for name in target_names():
        target = target_named(name)
        assert target.name == name and target.channel_alignment % target.narrow_channel_alignment == 0
        assert read_target(json.dumps(asdict(target)), "again", name) == target


@pytest.mark.parametrize(("name", "meant"), [("x86_vni", "x86_vnni"), ("X86", "x86"), ("x86-vnni", "x86_vnni")])
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        target_named(name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_text(opsett=3), "did you mean 'opset'"),
        (_text(opset="21"), "opset should be int"),
        (_text(activations="float"), "uint8 or int8"),
        (_text(cores=0), "cores is 0"),
        (_text(name="x87"), "not that of the file"),
        (_text(oldest_onnxruntime="new"), "no release"),
        (_text(cpu_flags=[[]]), "cpu_flags"),
        ("{", "not JSON"),
        ('{"name": "x86"}', "lacks the field"),
    ],
)
def test_a_file_that_is_no_target_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_target(text, "x86.json", "x86")
    assert "x86.json" in str(caught.value) and "bundle" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "facts", "found"),
    [
        (X86, {}, ("x86",)),
        (X86 | {"avx512_vnni"}, {}, ("x86_vnni", "x86")),
        (X86 | {"avx_vnni"}, {}, ("x86_vnni", "x86")),
        (frozenset({"fpu"}), {}, ()),
        (None, {}, ()),
        (X86, {"machine": "aarch64"}, ()),
        (X86, {"onnxruntime": "1.17.3"}, ()),
        (X86, {"onnxruntime": "1.18.0.dev2"}, ("x86",)),
        (X86, {"onnxruntime": None, "providers": None}, ("x86",)),
        (X86, {"providers": ["OtherExecutionProvider"]}, ()),
    ],
)
def test_a_machine_is_the_targets_that_it_can_do(
    flags: frozenset[str] | None, facts: dict[str, Any], found: tuple[str, ...]
) -> None:
    assert fitting({**MACHINE, **facts}, flags) == found


def test_a_device_with_too_little_memory_or_too_few_cores_is_none() -> None:
    target = read_target(_text(memory_bytes=1 << 30, cores=4), "x86.json", "x86")
    facts = {**MACHINE, "memory_bytes": 1 << 29, "cpu_cores_usable": 2}
    assert [reason.split()[0] for reason in target.misfits(facts, X86)] == ["memory_bytes", "cpu_cores_usable"]
    assert target.misfits({**facts, "memory_bytes": 1 << 30, "cpu_cores_usable": 4}, X86) == ()


def test_doctor_names_the_targets_and_the_fingerprint_does_not_know_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module.platform, "machine", lambda: "x86_64")
    (tmp_path / "proc").mkdir()
    reports = []
    for flags in ("fpu avx2", "fpu avx2 avx_vnni", "fpu"):
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        reports.append(doctor(tmp_path, distributions=["onnxruntime"], providers=["CPUExecutionProvider"]))
    plain, fast, none = reports
    assert plain.facts["targets"] == ["x86"] and fast.facts["targets"] == ["x86_vnni", "x86"]
    assert none.facts["targets"] is None and "the processor has no avx2" in none.unknown["targets"]
    assert plain.fingerprint == fast.fingerprint == none.fingerprint


def test_the_archive_brings_the_targets(tmp_path: Path) -> None:
    archive = tmp_path / "edge_runtime.pyz"
    write_runtime_archive(archive)
    code = (
        "from edge_runtime.targets.target import target_named, target_names; print(*map(target_named, target_names()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("Target(") == len(target_names()), done.stderr
