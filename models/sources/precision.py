"""Models that come in half precision: everything here is computed, compared and stored in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def in_float32(model: nn.Module) -> tuple[torch.dtype, ...]:
    """Turns the half-precision parameters and buffers of `model` into float32, in place; every value stays what it is.

    Returns:
        The dtypes that were turned, none if there were none.
    """
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    halves = tuple(dtype for dtype in HALF if dtype in found)
    if halves:
        model._apply(_widened)  # type: ignore[no-untyped-call]
    return halves


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
