"""PyTorch to ONNX, with proof: `export_bundle(model, task, out)` writes a bundle or says why it does not.

`export_bundle` is loaded when it is asked for: options and protocols are read by programs that never export.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import ExportOptions, ToleranceOptions
from .source import Source

if TYPE_CHECKING:
    from .bundle import ExportResult, export_bundle

__all__ = ["ExportOptions", "ExportResult", "Source", "ToleranceOptions", "export_bundle"]


def __getattr__(name: str) -> Any:
    if name in ("ExportResult", "export_bundle"):
        from . import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
