"""The processor by name, where /proc/cpuinfo gives numbers, and whether it is a real one.

ARM's kernels name implementer and part by number; the names are those that `lscpu` shows.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_PARTS = {
    "0x41": (
        "ARM",
        {
            "0xb76": "ARM1176",
            "0xc05": "Cortex-A5",
            "0xc07": "Cortex-A7",
            "0xc08": "Cortex-A8",
            "0xc09": "Cortex-A9",
            "0xc0e": "Cortex-A17",
            "0xc0f": "Cortex-A15",
            "0xd01": "Cortex-A32",
            "0xd03": "Cortex-A53",
            "0xd04": "Cortex-A35",
            "0xd05": "Cortex-A55",
            "0xd06": "Cortex-A65",
            "0xd07": "Cortex-A57",
            "0xd08": "Cortex-A72",
            "0xd09": "Cortex-A73",
            "0xd0a": "Cortex-A75",
            "0xd0b": "Cortex-A76",
            "0xd0c": "Neoverse-N1",
            "0xd0d": "Cortex-A77",
            "0xd0e": "Cortex-A76AE",
            "0xd40": "Neoverse-V1",
            "0xd41": "Cortex-A78",
            "0xd42": "Cortex-A78AE",
            "0xd43": "Cortex-A65AE",
            "0xd44": "Cortex-X1",
            "0xd46": "Cortex-A510",
            "0xd47": "Cortex-A710",
            "0xd48": "Cortex-X2",
            "0xd49": "Neoverse-N2",
            "0xd4a": "Neoverse-E1",
            "0xd4b": "Cortex-A78C",
            "0xd4c": "Cortex-X1C",
            "0xd4d": "Cortex-A715",
            "0xd4e": "Cortex-X3",
            "0xd4f": "Neoverse-V2",
            "0xd80": "Cortex-A520",
            "0xd81": "Cortex-A720",
            "0xd82": "Cortex-X4",
            "0xd84": "Neoverse-V3",
            "0xd85": "Cortex-X925",
            "0xd87": "Cortex-A725",
            "0xd8e": "Neoverse-N3",
        },
    ),
    "0x42": ("Broadcom", {"0x516": "ThunderX2"}),
    "0x43": ("Cavium", {"0x0a1": "ThunderX", "0x0af": "ThunderX2"}),
    "0x46": ("Fujitsu", {"0x001": "A64FX"}),
    "0x48": ("HiSilicon", {"0xd01": "TaiShan-v110", "0xd02": "TaiShan-v120"}),
    "0x4e": ("NVIDIA", {"0x000": "Denver", "0x003": "Denver 2", "0x004": "Carmel"}),
    "0x51": (
        "Qualcomm",
        {
            "0x001": "Oryon",
            "0x06f": "Krait",
            "0x201": "Kryo",
            "0x205": "Kryo",
            "0x211": "Kryo",
            "0x800": "Kryo-2XX Gold",
            "0x801": "Kryo-2XX Silver",
            "0x802": "Kryo-3XX Gold",
            "0x803": "Kryo-3XX Silver",
            "0x804": "Kryo-4XX Gold",
            "0x805": "Kryo-4XX Silver",
        },
    ),
    "0x53": ("Samsung", {"0x001": "Exynos-M1", "0x002": "Exynos-M3", "0x003": "Exynos-M4", "0x004": "Exynos-M5"}),
    "0x61": (
        "Apple",
        {
            "0x022": "M1 Icestorm",
            "0x023": "M1 Firestorm",
            "0x032": "M2 Blizzard",
            "0x033": "M2 Avalanche",
        },
    ),
    "0xc0": ("Ampere", {"0xac3": "Ampere-1", "0xac4": "Ampere-1a"}),
}
"""Implementer -> its name, and its parts."""

_X86_VENDORS = ("GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls")
_OF_X86 = re.compile(r"^(?:vendor_id\s*:\s*(?:" + "|".join(_X86_VENDORS) + r")|flags\s*:.*\bsse2\b.*)$", re.MULTILINE)
_EMULATED_MODELS = re.compile(r"\b(QEMU|TCG|VirtualApple)\b", re.IGNORECASE)


def processor_name(cpuinfo: str) -> str | None:
    """The processor, from the text of /proc/cpuinfo; None if it says nothing.

    Several kinds of cores are counted: ``"4x Cortex-A55 + 4x Cortex-A76"``.
    """
    model = re.search(r"^(?:(?i:model name)|cpu model|cpu|uarch)\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    chip = re.search(r"^(?:Hardware|Model)\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    cores = Counter(filter(None, map(_core, re.split(r"\n\s*\n", cpuinfo))))
    if not cores:
        found = model or chip
        return found[1].strip() if found else None
    name = " + ".join(f"{count}x {core}" for core, count in sorted(cores.items()))
    return f"{name} ({chip[1].strip()})" if chip else name


def emulation(cpuinfo: str, machine: str, root: Path) -> str | None:
    """What points to a processor that is emulated, in a sentence; None if nothing does.

    A virtual machine on a processor of its own kind is none: it computes at that processor's speed.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        machine: as `platform.machine` says it.
        root: folder that stands for ``/``.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i586", "i686")
    if not x86 and _OF_X86.search(cpuinfo):
        return f"/proc/cpuinfo is that of an x86 processor and the programs are for {machine}: qemu-user runs them"
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    clocks = root / "sys/devices/system/clocksource/clocksource0/available_clocksource"
    # the name alone may be that of a guest on the processor itself, which has a clock for that
    if model and _EMULATED_MODELS.search(model[1]) and "kvm-clock" not in (_text(clocks) or ""):
        return f"the processor calls itself {model[1].strip()!r}"
    if (_text(root / f"proc/sys/fs/binfmt_misc/qemu-{machine}") or "").startswith("enabled"):
        return f"/proc/sys/fs/binfmt_misc hands programs for {machine} to qemu"
    for process in ("proc/self/exe", "proc/1/exe"):
        try:
            program = (root / process).readlink().name
        except OSError:
            continue
        if program.startswith("qemu-"):
            return f"/{process} is {program}"
    return None


def _core(block: str) -> str | None:
    """What one entry of /proc/cpuinfo is a core of; None where it says nothing."""
    fields = dict(re.findall(r"^(CPU implementer|CPU part)\s*:\s*(0x[0-9a-fA-F]+)\s*$", block, re.MULTILINE))
    implementer, part = (fields.get(key, "").lower() for key in ("CPU implementer", "CPU part"))
    if not implementer or not part:
        return None
    maker, parts = _PARTS.get(implementer, (f"implementer {implementer}", {}))
    return parts.get(part, f"{maker} part {part}")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
