"""What machine this is: facts with reasons for those that are unknown, problems, and a fingerprint.

Read-only. Every file is looked up below one root folder, so that a test can bring its own machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .machine import thermal
from .machine.processor import emulation, processor_name
from .machine.session_probe import Probe, probe_session
from .process.plain_text import printable
from .targets.target import fitting, target_named, target_names

_JETPACK_OF_L4T = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}
"""Major release of Jetson Linux (L4T) -> JetPack."""

_VARIABLE_FACTS = frozenset(
    {
        "cpu_frequency_mhz",
        "memory_available_bytes",
        "load_average_1min",
        "executable",
        "temperatures_c",
        "throttled",
        "targets",
    }
)
"""Facts that change from minute to minute or with our releases, or say nothing about the machine: not part of the
fingerprint."""

_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "CUDA_VISIBLE_DEVICES",
    "MALLOC_ARENA_MAX",
)

_RUNTIMES = re.compile(
    "(ort-nightly|onnxruntime)(-(gpu|directml|openvino|rocm|migraphx|cann|silicon|training|training-gpu))?"
)
"""Names of distributions that bring a runtime, for those of which no list of files is known."""

_NEAR_LIMIT_C = 5.0

Fact = tuple[Any, str | None]
"""A value, or None and the reason why it is unknown."""


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found; `problems` must be repaired, `advice` may be."""

    facts: Mapping[str, Any]
    unknown: Mapping[str, str]
    """name of every fact that is None -> why."""
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    fingerprint: str
    schema_version: int = 1

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {**asdict(self), "ok": self.ok}

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=2) + "\n"

    def text(self) -> str:
        """The report on one screen."""
        width = max(len(name) for name in self.facts)
        lines = [
            printable(f"{name:<{width}}  {value if value is not None else 'unknown: ' + self.unknown[name]}")
            for name, value in self.facts.items()
        ]
        lines.append(f"{'fingerprint':<{width}}  {self.fingerprint}")
        lines += [printable(f"PROBLEM: {problem}") for problem in self.problems]
        lines += [printable(f"advice: {advice}") for advice in self.advice]
        if self.ok:
            lines.append("no problems found")
        return "\n".join(lines)


def doctor(
    root: str | os.PathLike[str] = "/",
    distributions: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    machine: str | None = None,
) -> DoctorReport:
    """Looks at this machine.

    Args:
        root: folder that stands for ``/``; tests bring their own /proc, /sys and /etc.
        distributions: names of the installed onnxruntime distributions; None: look.
        providers: ONNX Runtime's available providers; None: ask it.
        machine: what the programs are for, e.g. ``aarch64``; None: ask the system.
    """
    probe = probe_session()
    known = collect_facts(root, distributions, providers, probe, machine)
    facts = {name: value for name, (value, _) in known.items()}
    unknown = {name: reason or "unknown" for name, (value, reason) in known.items() if value is None}
    return DoctorReport(
        facts=facts,
        unknown=unknown,
        problems=tuple(_problems(facts, probe)),
        advice=(*_advice(facts), *_heat(Path(root))),
        fingerprint=fingerprint(facts),
    )


def fingerprint(facts: Mapping[str, Any] | None = None) -> str:
    """Hash of everything about the machine that makes two measurements comparable, 16 hex digits.

    Args:
        facts: as in `DoctorReport.facts`; None: collect them.
    """
    if facts is None:
        facts = {name: value for name, (value, _) in collect_facts().items()}
    lasting = {name: value for name, value in facts.items() if name not in _VARIABLE_FACTS}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:16]


def collect_facts(
    root: str | os.PathLike[str] = "/",
    distributions: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    probe: Probe | None = None,
    machine: str | None = None,
) -> dict[str, Fact]:
    """Facts by name, each with the reason if it is unknown.

    Args:
        root: as in `doctor`.
        distributions: as in `doctor`.
        providers: as in `doctor`.
        probe: what was found when ONNX Runtime was tried; None: it is known to work.
        machine: as in `doctor`.
    """
    root = Path(root)
    machine = machine or platform.machine()
    facts: dict[str, Fact] = {
        "python": (platform.python_version(), None),
        "executable": (sys.executable, None),
        **_software(distributions, providers, probe),
        "machine": (machine, None),
        "kernel": (platform.release(), None),
        "libc": _or_unknown(" ".join(platform.libc_ver()).strip(), "not a glibc system"),
        **_cpu(root, machine),
        **_memory(root),
        **_thermal(root),
        **_board(root),
        "environment": ({name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}, None),
    }
    return {**facts, "targets": _targets(root, {name: value for name, (value, _) in facts.items()})}


def runtime_distributions() -> list[str]:
    """Installed distributions that bring an `onnxruntime` package, e.g. ``["onnxruntime-gpu"]``.

    Others live beside the runtime and are no second one: onnxruntime-extensions, -genai, and plug-ins with a provider,
    such as onnxruntime-qnn since it no longer brings a runtime along.
    """
    names = set()
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower()
        if not re.search(r"\b(onnxruntime|ort)\b", name):
            continue
        files = getattr(found, "files", None)
        if any(file.as_posix() == "onnxruntime/__init__.py" for file in files or ()) or (
            files is None and _RUNTIMES.fullmatch(name)
        ):
            names.add(name)
    return sorted(names)


def _software(
    distributions: Sequence[str] | None, providers: Sequence[str] | None, probe: Probe | None
) -> dict[str, Fact]:
    import numpy

    facts: dict[str, Fact] = {"numpy": (numpy.__version__, None)}
    reason = None
    if probe is not None and not probe.imported:
        # not imported here: what ends one process would end this one as well
        reason = probe.problem
    else:
        try:
            import onnxruntime

            available = onnxruntime.get_available_providers() if providers is None else providers
        except (ImportError, AttributeError) as error:
            reason = f"cannot be imported ({error})"
    if reason is not None:
        facts.update({"onnxruntime": (None, reason), "onnxruntime_build": (None, reason)})
        facts["providers"] = (None, reason) if providers is None else (list(providers), None)
    else:
        build = getattr(onnxruntime, "get_build_info", None)
        facts["onnxruntime"] = (str(onnxruntime.__version__), None)
        facts["onnxruntime_build"] = (build(), None) if build else (None, "this release does not say")
        facts["providers"] = (list(available), None)
    if distributions is None:
        installed = runtime_distributions()
    else:
        installed = [name for name in distributions if _RUNTIMES.fullmatch(name) or len(distributions) == 1]
    facts["onnxruntime_distributions"] = (installed, None)
    return facts


def _cpu(root: Path, machine: str) -> dict[str, Fact]:
    info, reason = _read(root / "proc/cpuinfo")
    physical: set[tuple[str, str]] = set()
    if info is not None:
        for block in info.split("\n\n"):
            fields = dict(re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE))
            if "core id" in fields:
                physical.add((fields.get("physical id", "0"), fields["core id"]))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor, no_governor = _read(frequency / "scaling_governor")
    current, no_current = _read_number(frequency / "scaling_cur_freq", 1e-3)
    highest, no_highest = _read_number(frequency / "cpuinfo_max_freq", 1e-3)
    load, no_load = _read(root / "proc/loadavg")
    return {
        "cpu_model": _or_unknown(
            processor_name(info or ""), reason or "/proc/cpuinfo names no model, and no part as it does on ARM"
        ),
        "cpu_emulated": (emulation(info or "", machine, root) or False, None),
        "cpu_cores_logical": _or_unknown(os.cpu_count(), "the system does not say"),
        "cpu_cores_physical": _or_unknown(len(physical), reason or "/proc/cpuinfo lists no core ids"),
        "cpu_cores_usable": _or_unknown(usable, "the system has no CPU affinity"),
        "cpu_governor": (governor, no_governor),
        "cpu_frequency_mhz": (current, no_current),
        "cpu_frequency_max_mhz": (highest, no_highest),
        "load_average_1min": (float(load.split()[0]), None) if load else (None, no_load),
    }


def _thermal(root: Path) -> dict[str, Fact]:
    found = thermal.zones(root)
    named: dict[str, float] = {}
    for zone in found:
        name, number = zone.name, 2
        while name in named:
            name, number = f"{zone.name} {number}", number + 1
        named[name] = round(zone.temperature, 1)
    none = f"no zone in {root / 'sys/class/thermal'} tells a temperature"
    return {"temperatures_c": (named, None) if named else (None, none), "throttled": (thermal.throttled(root), None)}


def _memory(root: Path) -> dict[str, Fact]:
    text, reason = _read(root / "proc/meminfo")
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text or "", re.MULTILINE))
    return {
        name: _or_unknown(int(fields.get(key, 0)) * 1024, reason or f"/proc/meminfo has no {key}")
        for name, key in (("memory_bytes", "MemTotal"), ("memory_available_bytes", "MemAvailable"))
    }


def _board(root: Path) -> dict[str, Fact]:
    model, no_model = _read(root / "proc/device-tree/model")
    release, no_release = _read(root / "etc/nv_tegra_release")
    facts: dict[str, Fact] = {
        "board": (model.strip("\0 ") if model else None, no_model),
        "jetson_linux": (None, no_release and f"{no_release}: not a Jetson"),
        "jetpack": (None, no_release and f"{no_release}: not a Jetson"),
    }
    if release is not None:
        match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release)
        facts["jetson_linux"] = (f"{match[1]}.{match[2]}", None) if match else (None, f"unreadable: {release!r:.60}")
        jetpack = _JETPACK_OF_L4T.get(int(match[1])) if match else None
        facts["jetpack"] = _or_unknown(jetpack, "no known JetPack for this release of Jetson Linux")
    return facts


def _targets(root: Path, facts: Mapping[str, Any]) -> Fact:
    """The shipped targets that this machine is, or why it is none."""
    info, _ = _read(root / "proc/cpuinfo")
    line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info or "", re.MULTILINE)
    flags = frozenset(line[1].split()) if line else None
    if names := fitting(facts, flags):
        return list(names), None
    reasons = [f"{name}: {', '.join(target_named(name).misfits(facts, flags))}" for name in target_names()]
    return None, "; ".join(reasons)


def _problems(facts: Mapping[str, Any], probe: Probe) -> list[str]:
    installed = facts["onnxruntime_distributions"]
    problems = []
    package = "the wheel NVIDIA builds for this JetPack" if facts["jetson_linux"] else "onnxruntime"
    if not installed and not probe.imported:
        problems.append(f"onnxruntime cannot be imported: install {package} for Python {facts['python']}")
    elif probe.problem is not None:
        again = installed[0] if len(installed) == 1 and not facts["jetson_linux"] else package
        problems.append(
            f"{probe.problem}: no bundle runs here; uninstall {' and '.join(installed) or 'every onnxruntime'}, then "
            f"install {again} for Python {facts['python']} again"
        )
    if len(installed) > 1:
        problems.append(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            "uninstall all of them, then install the one you need"
        )
    return problems


def _advice(facts: Mapping[str, Any]) -> list[str]:
    advice = []
    providers = facts["providers"] or []
    if facts["jetson_linux"] is not None and "CUDAExecutionProvider" not in providers:
        jetpack = f"JetPack {facts['jetpack']}" if facts["jetpack"] else f"Jetson Linux {facts['jetson_linux']}"
        advice.append(
            f"this is a Jetson with {jetpack}: PyPI has no onnxruntime-gpu wheel for it. Take the wheel that "
            f"NVIDIA builds for {jetpack} and Python {facts['python']}, from the Jetson AI Lab package "
            "index or the Jetson Zoo page, and do not install onnxruntime from PyPI over it"
        )
    if facts["cpu_governor"] not in (None, "performance"):
        advice.append(
            f"the CPU governor is {facts['cpu_governor']!r}: clocks follow the load, latencies will "
            "vary; set 'performance' for a benchmark"
        )
    if facts["cpu_emulated"]:
        advice.append(f"{facts['cpu_emulated']}: latencies measured here say nothing about a device, verify does")
    load, cores = facts["load_average_1min"], facts["cpu_cores_usable"]
    if load is not None and cores and load > 0.5 * cores:
        advice.append(f"the load average is {load:g} on {cores} cores: other work disturbs measurements")
    return advice


def _heat(root: Path) -> list[str]:
    advice = [
        f"the clocks are held down ({what}): latencies are those of a hot machine" for what in thermal.throttled(root)
    ]
    for zone in thermal.zones(root):
        if zone.limit is not None and zone.temperature > zone.limit - _NEAR_LIMIT_C:
            advice.append(
                f"{zone.name} is at {zone.temperature:.0f} °C, and from {zone.limit:.0f} °C on the system slows down: "
                "let it cool, or measure for as long as the device will run"
            )
    return advice


def _read(path: Path) -> tuple[str | None, str | None]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(), None
    except OSError as error:
        return None, f"{path}: {error.strerror}"


def _read_number(path: Path, factor: float) -> Fact:
    text, reason = _read(path)
    if text is None:
        return None, reason
    return (float(text) * factor, None) if text.isdigit() else (None, f"{path} holds {text!r}")


def _or_unknown(value: Any, reason: str) -> Fact:
    return (value, None) if value else (None, reason)
