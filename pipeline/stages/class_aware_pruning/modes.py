"""How a model is run to look into it: with hooks that leave nothing behind, and nothing of PyTorch's fused ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_eval(model: nn.Module, training_branches: bool = False) -> Iterator[None]:
    """Eval mode without PyTorch's fused attention, which passes hooks by and swallows NaN; restored afterwards.

    Args:
        model: any.
        training_branches: let modules that hold others go the way of training (auxiliary heads), while layers such as
            normalisations stay in eval mode; buffers that their code writes to are restored as well.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    saved = []
    if training_branches:
        saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
        for module in modes:
            module.training = next(module.children(), None) is not None
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def hooked(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
