"""PyTorch to ONNX, with proof: `export_bundle(model, task, out)` writes a bundle or says why it does not."""

from .bundle import ExportResult, export_bundle
from .options import ExportOptions, ToleranceOptions
from .source import Source

__all__ = ["ExportOptions", "ExportResult", "Source", "ToleranceOptions", "export_bundle"]
