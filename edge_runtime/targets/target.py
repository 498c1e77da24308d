"""The schema of a target, and the targets that ship: every `NAME.json` of this folder is one.

JSON, because the device has no YAML parser and the standard library of Python 3.10 no TOML reader.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..bundle.typed_json import DAMAGED, strict_json, typed
from ..errors import BundleError, InputError

ACTIVATIONS = ("uint8", "int8")


@dataclass(frozen=True)
class Target:
    """A kind of device: what its runtime reads, and what its processor computes well."""

    name: str
    description: str
    machines: tuple[str, ...]
    """what ``platform.machine()`` says there, any of them."""
    cpu_flags: tuple[tuple[str, ...], ...]
    """of every entry one must be among the flags (on ARM: features) of /proc/cpuinfo."""
    oldest_onnxruntime: str
    """release that `opset` and `ir_version` are read by, ``"1.18"``."""
    opset: int
    """newest ONNX opset that it reads."""
    ir_version: int
    """newest version of the ONNX format that it reads."""
    providers: tuple[str, ...]
    """execution providers, best first."""
    activations: str
    """type of quantized activations, ``"uint8"`` or ``"int8"``."""
    reduce_range: bool
    """whether int8 weights must keep to 7 bits, because the sum of two products saturates at 16."""
    channel_alignment: int
    """channels that a convolution computes in one go: widths are multiples of it."""
    narrow_channel_alignment: int
    """the same for layers narrower than four times `channel_alignment`, which would have no choice left."""
    memory_bytes: int | None
    """what the device has; null for a kind of device of any size."""
    cores: int | None
    """likewise."""

    def misfits(self, facts: Mapping[str, Any], flags: frozenset[str] | None) -> tuple[str, ...]:
        """Why a machine is not this target, a phrase each; empty if it is.

        Args:
            facts: as in `DoctorReport.facts`. What is unknown (None, or not there) is not held against the machine.
            flags: of /proc/cpuinfo; None: unknown, which no target with `cpu_flags` accepts.
        """
        found = []
        if facts.get("machine") not in self.machines:
            found.append(f"the machine is {facts.get('machine')!r}, not {' or '.join(self.machines)}")
        for group in self.cpu_flags:
            if flags is None:
                found.append(f"whether the processor has {' or '.join(group)} is unknown")
            elif flags.isdisjoint(group):
                found.append(f"the processor has no {' or '.join(group)}")
        runtime = facts.get("onnxruntime")
        if runtime is not None and _release(runtime) < _release(self.oldest_onnxruntime):
            found.append(f"onnxruntime {runtime} is older than {self.oldest_onnxruntime}")
        providers = facts.get("providers")
        if providers is not None and not set(self.providers) & set(providers):
            found.append(f"onnxruntime has none of {', '.join(self.providers)}")
        for fact, least in (("memory_bytes", self.memory_bytes), ("cpu_cores_usable", self.cores)):
            if least is not None and facts.get(fact) is not None and facts[fact] < least:
                found.append(f"{fact} is {facts[fact]}, below {least}")
        return tuple(found)


def target_names() -> tuple[str, ...]:
    """The targets that ship, in alphabetical order."""
    return tuple(sorted(name for name, _ in _files()))


@cache
def target_named(name: str) -> Target:
    """A target that ships.

    Raises:
        InputError: no target has this name.
    """
    for known, text in _files():
        if known == name:
            return read_target(text, f"{name}.json", name)
    close = difflib.get_close_matches(name, target_names(), n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise InputError(f"unknown target {name!r}{hint} There are: {', '.join(target_names())}")


def read_target(text: str, where: str, name: str) -> Target:
    """Reads the content of a target's file.

    Args:
        text: JSON.
        where: what is read, for the messages.
        name: that the file must give itself.

    Raises:
        InputError: not JSON, a key that is missing, unknown or of a wrong type, or a value that no device has.
    """
    try:
        target = typed(Target, strict_json(text), where)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): correct the file") from None
    except BundleError as error:
        raise InputError(f"{str(error).removesuffix(DAMAGED)}: correct the file") from None
    assert isinstance(target, Target)
    wrong = next(_impossible(target, name), None)
    if wrong is not None:
        raise InputError(f"{where}: {wrong}: correct the file")
    return target


def fitting(facts: Mapping[str, Any], flags: frozenset[str] | None) -> tuple[str, ...]:
    """Names of the shipped targets that a machine is, the most demanding first. Arguments as in `Target.misfits`."""
    targets = [target for target in map(target_named, target_names()) if not target.misfits(facts, flags)]
    return tuple(target.name for target in sorted(targets, key=lambda target: -len(target.cpu_flags)))


def _impossible(target: Target, name: str) -> Iterator[str]:
    if target.name != name:
        yield f"name is {target.name!r}, not that of the file"
    if target.activations not in ACTIVATIONS:
        yield f"activations is {target.activations!r}, not {' or '.join(ACTIVATIONS)}"
    if not re.fullmatch(r"\d+(\.\d+)+", target.oldest_onnxruntime):
        yield f"oldest_onnxruntime is {target.oldest_onnxruntime!r}, no release as in '1.18'"
    if not target.providers or not target.machines or not all(target.cpu_flags):
        yield "providers, machines and every entry of cpu_flags name one thing at least"
    for field in ("opset", "ir_version", "channel_alignment", "narrow_channel_alignment", "memory_bytes", "cores"):
        value = getattr(target, field)
        if value is not None and value < 1:
            yield f"{field} is {value}, not positive"


def _files() -> Iterator[tuple[str, str]]:
    """Name and content of every target's file, in a folder or in the zip that edge_runtime.pyz is."""
    for entry in resources.files(__package__ or "").iterdir():
        if entry.name.endswith(".json"):
            yield entry.name.removesuffix(".json"), entry.read_text(encoding="utf-8")


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning: 1.23.0.dev2 is 1.23.0."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
