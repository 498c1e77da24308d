from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewright.edge_runtime import device as device_module
from edgewright.edge_runtime import doctor, fingerprint

JETPACKS = {
    "4": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: Sat Feb 19",
    "5": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: Tue Aug  1",
    "6": "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic, EABI: aarch64, DATE: Fri Jul 19",
}


def _machine(root: Path, **files: str) -> Path:
    base = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\nphysical id\t: 0\ncore id\t: 0\n\n"
        "processor\t: 1\nmodel name\t: Fast CPU\nphysical id\t: 0\ncore id\t: 0\n",
        "proc/meminfo": "MemTotal:       4096 kB\nMemAvailable:   1024 kB\n",
        "proc/loadavg": "0.00 0.01 0.05 1/200 1234",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2000000\n",
    }
    for name, text in {**base, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_facts_of_an_ordinary_machine(tmp_path: Path) -> None:
    report = doctor(_machine(tmp_path), distributions=["onnxruntime"], providers=["CPUExecutionProvider"])
    facts = report.facts
    assert facts["cpu_model"] == "Fast CPU" and facts["cpu_cores_physical"] == 1
    assert facts["memory_bytes"] == 4096 * 1024 and facts["memory_available_bytes"] == 1024 * 1024
    assert facts["cpu_governor"] == "performance" and facts["cpu_frequency_mhz"] == 1500
    assert facts["board"] is None and "not a Jetson" in report.unknown["jetpack"]
    assert report.ok and report.advice == ()
    assert "no problems found" in report.text()
    json.loads(report.to_json())


def test_an_empty_machine_has_reasons_and_no_guesses(tmp_path: Path) -> None:
    report = doctor(tmp_path, distributions=[], providers=[])
    for name, value in report.facts.items():
        assert (value is None) == (name in report.unknown), name
    assert {"cpu_model", "memory_bytes", "cpu_governor", "load_average_1min"} <= set(report.unknown)


@pytest.mark.parametrize("jetpack", sorted(JETPACKS))
def test_a_jetson_is_told_where_its_wheel_comes_from(tmp_path: Path, jetpack: str) -> None:
    root = _machine(
        tmp_path,
        **{
            "etc/nv_tegra_release": JETPACKS[jetpack],
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\n",
        },
    )
    report = doctor(root, distributions=["onnxruntime"], providers=["CPUExecutionProvider"])
    assert report.facts["board"] == "NVIDIA Jetson Orin Nano" and report.facts["jetpack"] == jetpack
    assert "ARM" in report.unknown["cpu_model"]
    (advice,) = report.advice
    assert f"JetPack {jetpack}" in advice and "PyPI has no onnxruntime-gpu wheel" in advice
    assert "http" not in advice
    with_cuda = doctor(root, distributions=["onnxruntime-gpu"], providers=["CUDAExecutionProvider"])
    assert with_cuda.advice == ()


def test_an_unreadable_release_file_is_not_guessed(tmp_path: Path) -> None:
    root = _machine(tmp_path, **{"etc/nv_tegra_release": "# something new"})
    report = doctor(root, distributions=["onnxruntime"], providers=[])
    assert report.facts["jetson_linux"] is None and "something new" in report.unknown["jetson_linux"]


def test_two_runtimes_are_a_problem(tmp_path: Path) -> None:
    report = doctor(_machine(tmp_path), distributions=["onnxruntime", "onnxruntime-gpu"])
    assert not report.ok and "both installed" in report.problems[0]
    assert "PROBLEM: onnxruntime and onnxruntime-gpu" in report.text()


def test_extensions_are_no_second_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    names = ["onnxruntime-gpu", "onnxruntime-extensions", "onnxruntime-genai", "numpy", "ORT-nightly"]
    monkeypatch.setattr(device_module.importlib.metadata, "distributions", lambda: [Found(name) for name in names])
    assert device_module.runtime_distributions() == ["onnxruntime-gpu", "ort-nightly"]


def test_advice_on_what_disturbs_a_measurement(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        **{
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "proc/loadavg": "99.00 0 0 1/1 1",
        },
    )
    text = doctor(root, distributions=["onnxruntime"], providers=[]).text()
    assert "'powersave'" in text and "load average is 99" in text


def test_the_fingerprint_ignores_what_changes_by_the_minute(tmp_path: Path) -> None:
    def of(folder: str, **files: str) -> str:
        report = doctor(_machine(tmp_path / folder, **files), distributions=["onnxruntime"], providers=[])
        return report.fingerprint

    base = of("a")
    assert base == of("b", **{"proc/loadavg": "9.00 0 0 1/1 1"}) and len(base) == 16
    assert base != of("c", **{"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"})
    assert fingerprint() == fingerprint()


def _fake_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """An `onnxruntime` that a new process finds instead of the true one."""
    package = folder / "fake" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return folder


BROKEN = {
    "import os, signal; os.kill(os.getpid(), signal.SIGILL)": "SIGILL",
    "raise ImportError('libfoo.so: cannot open shared object file')": "libfoo.so",
    "raise RuntimeError('odd')": "odd",
    "__version__ = '1.0'": "InferenceSession",
    "class SessionOptions: pass\ndef InferenceSession(*_, **__): raise RuntimeError('no provider')": "no provider",
    "import os\nclass SessionOptions: pass\ndef InferenceSession(*_, **__): os.abort()": "SIGABRT",
    "class SessionOptions: pass\nclass InferenceSession:\n    def __init__(*_, **__): pass\n"
    "    def run(self, *_): return [[0, 0]]": "answers",
}


@pytest.mark.parametrize(("code", "word"), BROKEN.items())
def test_a_runtime_without_sessions_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, word: str
) -> None:
    root = _fake_runtime(_machine(tmp_path), monkeypatch, code)
    report = doctor(root, distributions=["onnxruntime"], providers=["CPUExecutionProvider"])
    assert not report.ok and "no problems found" not in report.text()
    (problem,) = report.problems
    assert word in problem and "install onnxruntime for Python" in problem
    json.loads(report.to_json())
