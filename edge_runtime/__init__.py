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
    from .answers.boxes import Boxes
    from .answers.class_map import ClassMap
    from .answers.classes import Prediction
    from .answers.embedding import Vectors
    from .answers.image import Restored
    from .answers.multilabel import Labels
    from .answers.tokens import Tokens
    from .answers.values import Values
    from .bundle.archive import write_runtime_archive
    from .bundle.bundle import Bundle, file_sha256, open_bundle, pack_zip, write_manifest
    from .bundle.golden import read_golden, write_golden
    from .bundle.latency_record import record_latency
    from .bundle.manifest import AnswerSpec, GoldenCase, Manifest
    from .device import DoctorReport, doctor, fingerprint
    from .errors import BundleError, EdgewrightError, InputError, ParityError, ProviderError, QualityFloorError
    from .inference.image_file import load_image
    from .inference.options import SessionOptions
    from .inference.providers import Placement, ProviderFallbackWarning
    from .inference.runner import Runner
    from .inference.session import load, session_on
    from .inference.sound_file import load_sound
    from .inference.table_file import load_table
    from .inference.text_file import encode_texts
    from .measure.benchmark import BenchRow, bench, bench_text
    from .measure.exit_latency import latency_table
    from .measure.interleave import Contender, Interleaved, interleaved
    from .proof.comparison import Comparison, compare
    from .proof.raw_check import RawReport, check_raw
    from .proof.verification import VerifyReport, verify

_WHERE = {
    "AnswerSpec": "bundle.manifest",
    "BenchRow": "measure.benchmark",
    "Boxes": "answers.boxes",
    "Bundle": "bundle.bundle",
    "BundleError": "errors",
    "ClassMap": "answers.class_map",
    "Restored": "answers.image",
    "Comparison": "proof.comparison",
    "Contender": "measure.interleave",
    "DoctorReport": "device",
    "EdgewrightError": "errors",
    "GoldenCase": "bundle.manifest",
    "InputError": "errors",
    "Interleaved": "measure.interleave",
    "Labels": "answers.multilabel",
    "Manifest": "bundle.manifest",
    "ParityError": "errors",
    "Placement": "inference.providers",
    "Prediction": "answers.classes",
    "ProviderError": "errors",
    "ProviderFallbackWarning": "inference.providers",
    "QualityFloorError": "errors",
    "RawReport": "proof.raw_check",
    "Runner": "inference.runner",
    "SessionOptions": "inference.options",
    "Tokens": "answers.tokens",
    "Values": "answers.values",
    "Vectors": "answers.embedding",
    "VerifyReport": "proof.verification",
    "bench": "measure.benchmark",
    "bench_text": "measure.benchmark",
    "check_raw": "proof.raw_check",
    "compare": "proof.comparison",
    "doctor": "device",
    "file_sha256": "bundle.bundle",
    "fingerprint": "device",
    "interleaved": "measure.interleave",
    "latency_table": "measure.exit_latency",
    "load": "inference.session",
    "load_image": "inference.image_file",
    "load_sound": "inference.sound_file",
    "load_table": "inference.table_file",
    "encode_texts": "inference.text_file",
    "open_bundle": "bundle.bundle",
    "pack_zip": "bundle.bundle",
    "read_golden": "bundle.golden",
    "record_latency": "bundle.latency_record",
    "session_on": "inference.session",
    "verify": "proof.verification",
    "write_golden": "bundle.golden",
    "write_manifest": "bundle.bundle",
    "write_runtime_archive": "bundle.archive",
}
# Two modules are called `verification` and `comparison` because a submodule that has the name of a function
# here would take its place in the package as soon as anything imports it.

__all__ = [
    "AnswerSpec",
    "BenchRow",
    "Boxes",
    "Bundle",
    "BundleError",
    "ClassMap",
    "Comparison",
    "Contender",
    "DoctorReport",
    "EdgewrightError",
    "GoldenCase",
    "InputError",
    "Interleaved",
    "Labels",
    "Manifest",
    "ParityError",
    "Placement",
    "Prediction",
    "ProviderError",
    "ProviderFallbackWarning",
    "QualityFloorError",
    "RawReport",
    "Restored",
    "Runner",
    "SessionOptions",
    "Tokens",
    "Values",
    "Vectors",
    "VerifyReport",
    "bench",
    "bench_text",
    "check_raw",
    "compare",
    "doctor",
    "encode_texts",
    "file_sha256",
    "fingerprint",
    "interleaved",
    "latency_table",
    "load",
    "load_image",
    "load_sound",
    "load_table",
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
