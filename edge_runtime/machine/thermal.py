"""How hot the machine is, and whether its clocks are held down for it: Linux's thermal zones and cooling devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PLAUSIBLE = (-40.0, 150.0)
"""Celsius: a zone without its sensor says -274 or nonsense."""


@dataclass(frozen=True)
class Zone:
    """A thermal zone; Celsius."""

    name: str
    temperature: float
    limit: float | None
    """the lowest temperature at which the kernel slows something down, or where it would end the machine."""


def zones(root: Path) -> list[Zone]:
    """Those below `root` that tell a temperature, in the order of their numbers."""
    found = []
    for folder in _numbered(root / "sys/class/thermal", "thermal_zone"):
        temperature = _celsius(folder / "temp")
        if temperature is not None:
            found.append(Zone(_text(folder / "type") or folder.name, temperature, _limit(folder)))
    return found


def throttled(root: Path) -> list[str]:
    """The processor's cooling devices that hold its clocks down now."""
    names = []
    for folder in _numbered(root / "sys/class/thermal", "cooling_device"):
        kind, state = _text(folder / "type") or "", _text(folder / "cur_state") or ""
        of_processor = any(part in kind.lower() for part in ("cpufreq", "processor", "cpu"))
        if of_processor and state.isdigit() and int(state) > 0:
            names.append(f"{kind} at step {state} of {_text(folder / 'max_state') or '?'}")
    return names


def _limit(zone: Path) -> float | None:
    limits = []
    for kind in zone.glob("trip_point_*_type"):
        if _text(kind) in ("passive", "hot", "critical"):
            limits.append(_celsius(kind.with_name(kind.name.replace("_type", "_temp"))))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def _celsius(path: Path) -> float | None:
    text = _text(path) or ""
    try:
        value = int(text) / 1000
    except ValueError:
        return None
    return value if _PLAUSIBLE[0] < value < _PLAUSIBLE[1] else None


def _numbered(folder: Path, prefix: str) -> list[Path]:
    found = [path for path in folder.glob(prefix + "*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # a driver that is asleep answers with an error
        return None
