"""What every cell imports, once: the server that cells are forked from loads this module."""

from __future__ import annotations

import copy
import functools
from typing import Any

import architectures  # noqa: F401
import data  # noqa: F401
import timm  # noqa: F401
import torch
import torch._inductor.standalone_compile
import torchvision  # noqa: F401
import transformers  # noqa: F401
from torch.onnx._internal.exporter import _registration

import edgewright.edge_runtime
import edgewright.export.bundle
import edgewright.pipeline.report.report
import edgewright.pipeline.runs.runner  # noqa: F401

torch.set_num_threads(1)
_build = functools.cache(_registration.ONNXRegistry.from_torchlib)


def _copied(*arguments: Any, **named: Any) -> _registration.ONNXRegistry:
    """torch's exporter parses its whole operator library at every export, seconds each; here once for all cells."""
    built = _build(*arguments, **named)
    table = copy.copy(built)
    table.functions = {target: list(found) for target, found in built.functions.items()}
    return table


_registration.ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign,assignment]
