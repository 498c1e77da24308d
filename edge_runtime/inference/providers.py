"""Execution providers: what was asked for, what is there, what took the nodes. Strict unless told otherwise.

ONNX Runtime answers a provider it cannot start with a CPU session and a line on stderr. Here the order of
truth is: requested -> ``session.get_providers()`` -> the provider recorded for every node, and the first
difference is a `ProviderError`.
"""

from __future__ import annotations

import ctypes
import difflib
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, ProviderError

CPU = "CPUExecutionProvider"

_ALIASES = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "trt": "TensorrtExecutionProvider",
}
_LIBRARIES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}
_ALLOW = "allow_fallback=True (--allow-fallback on the command line) runs on the CPU instead and says so"


class ProviderFallbackWarning(UserWarning):
    """Something runs elsewhere than was asked for, because a fallback was allowed."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a session run."""

    requested: tuple[str, ...]
    session: tuple[str, ...]
    """providers of the session, in order of priority."""
    strict: bool
    method: str
    """how the placement is known."""
    nodes_per_provider: Mapping[str, int] | None
    """None where this ONNX Runtime cannot tell; nodes after basic optimizations, branches included as far as
    ONNX Runtime reports them."""
    cpu_nodes: tuple[str, ...] = ()
    """names of nodes on the CPU although another provider was asked for; at most 50."""
    fallback: tuple[str, ...] = ()
    """what did not run as it was asked, a sentence each; only with allow_fallback."""

    def text(self) -> str:
        """The providers of the session, with the nodes that each of them took where there are several."""
        counts = self.nodes_per_provider if len(self.session) > 1 else None
        return ", ".join(name if counts is None else f"{name} ({counts.get(name, 0)} nodes)" for name in self.session)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)


def provider_names(providers: Sequence[str] | str | None) -> tuple[str, ...]:
    """Full names of the providers asked for; None means the CPU.

    Raises:
        InputError: an unknown short name.
    """
    if providers is None:
        return (CPU,)
    given = [providers] if isinstance(providers, str) else list(providers)
    names: list[str] = []
    for name in given:
        full = _ALIASES.get(name.lower(), name)
        if not full.endswith("ExecutionProvider"):
            close = difflib.get_close_matches(name.lower(), _ALIASES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(sorted(_ALIASES))
            raise InputError(f"unknown execution provider {name!r}: {hint}use {known} or ONNX Runtime's full name")
        if full not in names:
            names.append(full)
    if not names:
        raise InputError("the list of execution providers is empty: leave it out to run on the CPU")
    return tuple(names)


def session_providers(requested: Sequence[str], available: Sequence[str], allow_fallback: bool) -> list[str]:
    """What to create the session with.

    Raises:
        ProviderError: a requested provider is not part of this ONNX Runtime and there is no fallback.
    """
    missing = [name for name in requested if name not in available]
    if missing and not allow_fallback:
        raise ProviderError(
            f"{', '.join(missing)} was asked for, this ONNX Runtime has {', '.join(available)}: "
            f"{_advice(missing[0])}; {_ALLOW}"
        )
    usable = [name for name in requested if name in available]
    if allow_fallback and CPU not in usable:
        usable.append(CPU)
    return usable


def not_started(requested: Sequence[str], present: Sequence[str], detail: str = "") -> ProviderError:
    """The error for a provider that exists in this ONNX Runtime and could not be used for the whole model."""
    missing = [name for name in requested if name not in present] or [n for n in requested if n != CPU]
    reason = "; ".join(filter(None, (_load_failure(name) for name in missing))) or detail
    return ProviderError(
        f"{', '.join(missing)} was asked for and did not take the whole model"
        + (f" ({reason})" if reason else "")
        + (f"; the session has {', '.join(present)}" if present else "")
        + f": {_advice(missing[0])}; {_ALLOW}"
    )


def without_the_broken(usable: Sequence[str]) -> tuple[list[str], list[str]]:
    """Providers to try next after a session with `usable` could not be created.

    Those go whose library does not load; if all libraries load, the first provider goes.

    Returns:
        The providers that are left, and why each of the others went, in the loader's words where it has any.
    """
    failures = {name: _load_failure(name) for name in usable if name != CPU}
    broken = {name: reason for name, reason in failures.items() if reason}
    if not broken:
        broken = dict(itertools.islice(failures.items(), 1))
    return [name for name in usable if name not in broken], [
        f"{name} could not start" + (f" ({reason})" if reason else "") for name, reason in broken.items()
    ]


def fallback_reasons(
    requested: Sequence[str], available: Sequence[str], present: Sequence[str], dropped: Sequence[str]
) -> tuple[str, ...]:
    """What of `requested` is not in the session that was created, a sentence each.

    Args:
        requested: full names.
        available: the providers of this ONNX Runtime.
        present: the providers of the session.
        dropped: sentences of `without_the_broken`.
    """
    reasons = [f"{name} is not part of this ONNX Runtime" for name in requested if name not in available]
    reasons += dropped
    for name in requested:
        # ONNX Runtime leaves some providers out with no more than a line on stderr, others end in an exception
        if name in available and name not in present and not any(text.startswith(f"{name} ") for text in dropped):
            detail = _load_failure(name)
            reasons.append(f"{name} could not start" + (f" ({detail})" if detail else ""))
    return tuple(reasons)


def warn_of_fallback(placement: Mapping[str, Any]) -> None:
    """Issues a `ProviderFallbackWarning` if anything did not run where it was asked to.

    Args:
        placement: `Placement.to_dict`.
    """
    what = list(placement["fallback"])
    if placement["cpu_nodes"] and list(placement["session"]) != [CPU]:
        count = (placement["nodes_per_provider"] or {}).get(CPU, len(placement["cpu_nodes"]))
        what.append(f"{count} nodes were not taken by the provider that was asked for")
    if what:
        ran = ", ".join(placement["session"])
        asked = ", ".join(placement["requested"])
        text = f"{asked} was asked for, this runs on {ran}: {'; '.join(what)}"
        warnings.warn(text, ProviderFallbackWarning, stacklevel=2)


def placement_of(session: Any, requested: Sequence[str], strict: bool, fallback: tuple[str, ...] = ()) -> Placement:
    """Reads the placement back from a session, per node where ONNX Runtime records it (from 1.24)."""
    present = tuple(session.get_providers())
    if not hasattr(session, "get_provider_graph_assignment_info"):
        only_cpu = present == (CPU,)
        method = (
            "the CPU is the session's only provider"
            if only_cpu
            else "session.disable_cpu_ep_fallback"
            if strict
            else "session.get_providers"
        )
        return Placement(tuple(requested), present, strict, method, None, fallback=fallback)
    counts: Counter[str] = Counter()
    cpu_nodes: list[str] = []
    for subgraph in session.get_provider_graph_assignment_info():
        for node in subgraph.get_nodes():
            counts[subgraph.ep_name] += 1
            if subgraph.ep_name == CPU and CPU not in requested:
                cpu_nodes.append(node.name)
    method = "session.record_ep_graph_assignment_info"
    return Placement(tuple(requested), present, strict, method, dict(counts), tuple(cpu_nodes[:50]), fallback)


def _advice(name: str) -> str:
    if name in _LIBRARIES:
        return (
            "install onnxruntime-gpu (and not onnxruntime beside it) with the CUDA, cuDNN and TensorRT "
            "libraries of its release, on a Jetson NVIDIA's own wheel; `doctor` shows what is there"
        )
    return f"install the build of ONNX Runtime that contains {name}; `doctor` shows what is there"


def _load_failure(name: str) -> str:
    """Why the provider's library does not load, in the loader's words; empty if it loads or is unknown."""
    import onnxruntime

    library = _LIBRARIES.get(name)
    if library is None:
        return ""
    path = Path(onnxruntime.__file__).parent / "capi" / library
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        # Anything else, such as undefined symbols, only means that it was loaded out of its order.
        if "cannot open shared object file" in str(error):
            return str(error)
    return ""
