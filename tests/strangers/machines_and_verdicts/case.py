"""Machines that are not what they seem, runtimes that do not run, and runs that were called noisy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgewright.edge_runtime import doctor
from edgewright.edge_runtime.measure.statistics import stability

EDGEWRIGHT = Path(sys.executable).parent / "edgewright"


def tell(name, right, what):
    print(f"{'right' if right else 'wrong'} {name}: {' '.join(str(what).split())[:110]!r}", flush=True)


def runtimes():
    classes = "class SessionOptions: pass\ndef get_available_providers(): return ['CPUExecutionProvider']\n"
    for name, code in {
        "no import": "raise ImportError('libx.so: cannot open shared object file')",
        "illegal instruction": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        "a shell that is left": "",
        "no session": classes + "def InferenceSession(*_, **__): raise RuntimeError('unknown operator')",
        "crash": classes + "import os\ndef InferenceSession(*_, **__): os.abort()",
    }.items():
        package = Path("fake", name.replace(" ", "_"), "onnxruntime")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        done = subprocess.run(
            [EDGEWRIGHT, "doctor"], env={**os.environ, "PYTHONPATH": str(package.parent.absolute())},
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        problem = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
        right = done.returncode == 5 and problem and "no problems found" not in done.stdout
        tell(f"doctor, {name}", right, problem or done.stdout[-80:] + done.stderr[-80:])


def machines():
    def machine(name, **files):
        for file, text in files.items():
            path = Path(name, file.replace("__", "/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Path(name)

    core = "processor : {}\nCPU implementer : 0x41\nCPU part : {}\n"
    cores = "\n".join(core.format(i, "0xd05" if i < 4 else "0xd0b") for i in range(8))
    report = doctor(machine("arm", proc__cpuinfo=cores), ["onnxruntime"], [], "aarch64")
    tell("doctor, ARM", report.facts["cpu_model"] == "4x Cortex-A55 + 4x Cortex-A76", report.facts["cpu_model"])
    x86 = "processor : 0\nvendor_id : AuthenticAMD\nmodel name : EPYC\n"
    report = doctor(machine("emulated", proc__cpuinfo=x86), ["onnxruntime"], [], "aarch64")
    tell("doctor, qemu", bool(report.facts["cpu_emulated"]) and any("qemu" in a for a in report.advice), report.advice)
    zone = "sys__class__thermal__thermal_zone0__"
    hot = {zone + "type": "soc", zone + "temp": "91000", zone + "trip_point_0_type": "passive"}
    report = doctor(machine("hot", **hot, **{zone + "trip_point_0_temp": "90000"}), ["onnxruntime"], [])
    tell("doctor, heat", any("91 °C" in advice for advice in report.advice), report.advice)
    report = doctor("hot", ["onnxruntime", "onnxruntime-qnn"], [])
    tell("doctor, plug-in", report.ok, report.problems or "no conflict")
    report = doctor("hot", ["onnxruntime", "onnxruntime-gpu"], [])
    tell("doctor, two runtimes", not report.ok, report.problems)


def verdicts():
    at, noise = np.arange(600), np.random.default_rng(0).normal(size=600)
    for name, wave in {"sine": np.sin(at / 9), "alternating": (-1.0) ** at, "trend": (at - 300) / 300}.items():
        small, large = (stability(1e6 * (1 + a * wave + 1e-4 * noise)) for a in (6e-4, 0.04))
        right = small.verdict == "stable" and large.verdict != "stable"
        tell(f"verdict, {name}", right, f"0.06 %: {small.verdict}, 4 %: {large.verdict}")


for case in (runtimes, machines, verdicts):
    try:
        case()
    except Exception as error:
        tell(case.__name__, False, f"{type(error).__name__}: {error}")
