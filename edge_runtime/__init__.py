"""What runs on the device: load, predict, verify, measure. Needs numpy and onnxruntime, nothing else.

::

    from edgewright import edge_runtime

    with edge_runtime.load("bundle/", providers=["cuda"], threads=2) as runner:
        print(runner.predict(image).label_names)
    edge_runtime.verify("bundle/").raise_if_failed()
    row = edge_runtime.bench("bundle/")

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archive import write_runtime_archive
    from .benchmark import bench, bench_text
    from .bundle import Bundle, file_sha256, open_bundle, pack_zip, write_manifest
    from .comparison import Comparison, compare
    from .device import DoctorReport, doctor, fingerprint
    from .errors import (
        BundleError,
        EdgewrightError,
        InputError,
        ParityError,
        ProviderError,
        QualityFloorError,
    )
    from .exit_latency import latency_table
    from .golden import read_golden, write_golden
    from .image_file import load_image
    from .interleave import Contender, Interleaved, interleaved
    from .latency_record import record_latency
    from .manifest import GoldenCase, Manifest
    from .providers import Placement, ProviderFallbackWarning
    from .raw_check import RawReport, check_raw
    from .runner import Prediction, Runner
    from .session import load, session_on
    from .verification import VerifyReport, verify

_WHERE = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "Comparison": "comparison",
    "Contender": "interleave",
    "DoctorReport": "device",
    "EdgewrightError": "errors",
    "GoldenCase": "manifest",
    "InputError": "errors",
    "Interleaved": "interleave",
    "Manifest": "manifest",
    "ParityError": "errors",
    "Placement": "providers",
    "Prediction": "runner",
    "ProviderError": "errors",
    "ProviderFallbackWarning": "providers",
    "QualityFloorError": "errors",
    "RawReport": "raw_check",
    "Runner": "runner",
    "VerifyReport": "verification",
    "bench": "benchmark",
    "bench_text": "benchmark",
    "check_raw": "raw_check",
    "compare": "comparison",
    "doctor": "device",
    "file_sha256": "bundle",
    "fingerprint": "device",
    "interleaved": "interleave",
    "latency_table": "exit_latency",
    "load": "session",
    "load_image": "image_file",
    "open_bundle": "bundle",
    "pack_zip": "bundle",
    "read_golden": "golden",
    "record_latency": "latency_record",
    "session_on": "session",
    "verify": "verification",
    "write_golden": "golden",
    "write_manifest": "bundle",
    "write_runtime_archive": "archive",
}
# Two modules are called `verification` and `comparison` because a submodule that has the name of a function
# here would take its place in the package as soon as anything imports it.

__all__ = [
    "Bundle",
    "BundleError",
    "Comparison",
    "Contender",
    "DoctorReport",
    "EdgewrightError",
    "GoldenCase",
    "InputError",
    "Interleaved",
    "Manifest",
    "ParityError",
    "Placement",
    "Prediction",
    "ProviderError",
    "ProviderFallbackWarning",
    "QualityFloorError",
    "RawReport",
    "Runner",
    "VerifyReport",
    "bench",
    "bench_text",
    "check_raw",
    "compare",
    "doctor",
    "file_sha256",
    "fingerprint",
    "interleaved",
    "latency_table",
    "load",
    "load_image",
    "open_bundle",
    "pack_zip",
    "read_golden",
    "record_latency",
    "session_on",
    "verify",
    "write_golden",
    "write_manifest",
    "write_runtime_archive",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
