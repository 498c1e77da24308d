"""Parameters and buffers that belong to the user's own modules: scales, position embeddings, tables and the like."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from .axes import is_following, is_mixing
from .flow import Axis, Flow

_TABLES = (nn.ParameterList, nn.ParameterDict, nn.Embedding)
"""Modules of PyTorch that hold tensors for the code around them."""


def plain_tensors(model: nn.Module, opaque: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The floats of more than one entry, by name.

    Args:
        model: any.
        opaque: paths of layers whose tensors are not where their type has them.
    """
    for path, module in model.named_modules():
        known = is_mixing(module) or is_following(module)
        theirs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _TABLES)
        if theirs or (known and path not in opaque):
            continue
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and tensor.numel() > 1:
                yield f"{path}.{name}" if path else name, tensor.data


def drop_single_rows(flow: Flow) -> None:
    """Of a table, leaves only the axis that tells channels apart: one row may be all that was looked up."""
    apart: dict[str, dict[Axis, int]] = {}
    for axis, readers in flow.feeds.items():
        if axis[1] not in ("in", "out") and axis not in flow.mixed:
            counts = [len(torch.unique(numbers[numbers >= 0])) for numbers in readers.values()]
            apart.setdefault(axis[0], {})[axis] = max(counts, default=0)
    for axes in apart.values():
        for axis, count in axes.items():
            if count <= 1 < max(axes.values()):
                del flow.feeds[axis], flow.widths[axis]
