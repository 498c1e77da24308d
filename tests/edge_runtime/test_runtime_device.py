from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest

from edgewright.edge_runtime import device as device_module
from edgewright.edge_runtime import doctor, fingerprint
from edgewright.edge_runtime.machine.processor import emulation, processor_name
from edgewright.edge_runtime.machine.session_probe import Probe, probe_session

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


@pytest.fixture(autouse=True)
def _tried_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is tried where a test is about that, not in every test of the other facts."""
    if "session" not in request.node.name and "ordinary" not in request.node.name:
        monkeypatch.setattr(device_module, "probe_session", lambda: Probe(True, None))


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
    # in this process as well, as it is where a runtime is imported that makes no session
    monkeypatch.delattr("onnxruntime.__version__")
    report = doctor(root, distributions=["onnxruntime"], providers=["CPUExecutionProvider"])
    assert not report.ok and "no problems found" not in report.text()
    (problem,) = report.problems
    assert word in problem and "install onnxruntime for Python" in problem
    json.loads(report.to_json())


def _arm(*cores: tuple[str, str], tail: str = "") -> str:
    entry = "processor\t: {}\nBogoMIPS\t: 108.00\nCPU implementer\t: {}\nCPU part\t: {}\nCPU revision\t: 3\n"
    return "\n".join(entry.format(i, *core) for i, core in enumerate(cores)) + tail


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (_arm(*[("0x41", "0xd08")] * 4, tail="\nHardware\t: BCM2711\n"), "4x Cortex-A72 (BCM2711)"),
        (_arm(*[("0x41", "0xd05")] * 2, *[("0x41", "0xd0b")] * 2), "2x Cortex-A55 + 2x Cortex-A76"),
        (_arm(("0x41", "0xd42")), "1x Cortex-A78AE"),
        (_arm(("0x41", "0xfff")), "1x ARM part 0xfff"),
        (_arm(("0x99", "0x001")), "1x implementer 0x99 part 0x001"),
        (_arm(("0x41", "0xc07")).replace("BogoMIPS", "model name : ARMv7 Processor rev 3\nBogoMIPS"), "1x Cortex-A7"),
        ("processor : 0\nuarch : sifive,u74-mc\n", "sifive,u74-mc"),
        ("processor : 0\nHardware : Something\n", "Something"),
    ],
)
def test_processors_have_names(cpuinfo: str, name: str, tmp_path: Path) -> None:
    assert processor_name(cpuinfo) == name
    assert emulation(cpuinfo, "aarch64", tmp_path) is None
    facts = device_module.collect_facts(_machine(tmp_path, **{"proc/cpuinfo": cpuinfo}), ["onnxruntime"], [])
    assert facts["cpu_model"] == (name, None)


@pytest.mark.parametrize(
    ("machine", "files", "word"),
    [
        ("aarch64", {"proc/cpuinfo": "processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon\n"}, "qemu-user"),
        ("riscv64", {"proc/cpuinfo": "processor : 0\nflags : fpu sse sse2 avx\n"}, "qemu-user"),
        ("x86_64", {"proc/cpuinfo": "processor : 0\nmodel name : QEMU Virtual CPU version 2.5+\n"}, "QEMU Virtual"),
        ("x86_64", {"proc/cpuinfo": "processor : 0\nmodel name : VirtualApple @ 2.50GHz\n"}, "VirtualApple"),
        ("aarch64", {"proc/sys/fs/binfmt_misc/qemu-aarch64": "enabled\ninterpreter /usr/bin/qemu"}, "binfmt"),
    ],
)
def test_an_emulated_processor_is_said_to_be_one(
    tmp_path: Path, machine: str, files: dict[str, str], word: str
) -> None:
    cpu = {"proc/cpuinfo": _arm(("0x41", "0xd08"))}
    report = doctor(_machine(tmp_path, **{**cpu, **files}), ["onnxruntime"], [], machine)
    assert word in report.facts["cpu_emulated"]
    assert any(word in advice and "say nothing about a device" in advice for advice in report.advice) and report.ok


def test_a_guest_on_the_processor_itself_is_not_emulated(tmp_path: Path) -> None:
    cpuinfo = "processor : 0\nmodel name : QEMU Virtual CPU version 2.5+\nflags : sse2 hypervisor\n"
    clocks = "sys/devices/system/clocksource/clocksource0/available_clocksource"
    assert emulation(cpuinfo, "x86_64", _machine(tmp_path)) is not None
    assert emulation(cpuinfo, "x86_64", _machine(tmp_path, **{clocks: "kvm-clock tsc"})) is None


def test_heat_is_a_fact_and_advice(tmp_path: Path) -> None:
    zone = "sys/class/thermal/thermal_zone"
    files = {
        f"{zone}0/type": "cpu-thermal\n",
        f"{zone}0/temp": "83500\n",
        f"{zone}0/trip_point_0_type": "active",
        f"{zone}0/trip_point_0_temp": "40000",
        f"{zone}0/trip_point_1_type": "passive",
        f"{zone}0/trip_point_1_temp": "85000",
        f"{zone}1/type": "gpu-thermal",
        f"{zone}1/temp": "41000",
        f"{zone}2/type": "off",
        f"{zone}2/temp": "-274000",
        f"{zone}10/type": "cpu-thermal",
        f"{zone}10/temp": "nonsense",
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
        "sys/class/thermal/cooling_device0/cur_state": "3",
        "sys/class/thermal/cooling_device0/max_state": "10",
        "sys/class/thermal/cooling_device1/type": "pwm-fan",
        "sys/class/thermal/cooling_device1/cur_state": "2",
    }
    cool = doctor(_machine(tmp_path / "cool"), ["onnxruntime"], [])
    hot = doctor(_machine(tmp_path / "hot", **files), ["onnxruntime"], [])
    assert hot.facts["temperatures_c"] == {"cpu-thermal": 83.5, "gpu-thermal": 41.0}
    assert hot.facts["throttled"] == ["cpufreq-cpu0 at step 3 of 10"]
    assert len(hot.advice) == 2 and "85 °C" in hot.advice[1] and hot.ok
    assert "tells a temperature" in cool.unknown["temperatures_c"] and cool.fingerprint == hot.fingerprint


def test_plug_ins_are_no_second_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def __init__(self, name: str, *files: str) -> None:
            self.metadata = {"Name": name}
            self.files = [PurePosixPath(file) for file in files]

    runtime = Found("onnxruntime", "onnxruntime/__init__.py")
    plug_in = Found("onnxruntime_qnn", "onnxruntime_qnn/__init__.py", "onnxruntime_qnn/libQnn.so")
    whole = Found("onnxruntime-qnn", "onnxruntime/__init__.py")
    found = [runtime, plug_in]
    monkeypatch.setattr(device_module.importlib.metadata, "distributions", lambda: found)
    assert device_module.runtime_distributions() == ["onnxruntime"]
    found[1] = whole
    assert device_module.runtime_distributions() == ["onnxruntime", "onnxruntime-qnn"]
    assert doctor(_machine(tmp_path), distributions=["onnxruntime", "onnxruntime-qnn"]).ok


def test_a_session_is_tried_in_a_process_of_its_own() -> None:
    assert probe_session() == Probe(True, None)
