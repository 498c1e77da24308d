"""How a model is run to look into it: with hooks that leave nothing behind, and nothing of PyTorch's fused ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class BufferStates:
    """What the buffers of a model were: code may write to them, or replace them, whenever it is called."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Puts back what was changed since."""
        for place, (module, name, buffer, version, value) in enumerate(self._saved):
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
                self._saved[place] = (module, name, buffer, buffer._version, value)


@contextmanager
def plain_eval(model: nn.Module, training_branches: bool = False) -> Iterator[None]:
    """Eval mode without PyTorch's fused attention, which passes hooks by and swallows NaN; then all is restored.

    Args:
        model: any.
        training_branches: let modules that hold others go the way of training (auxiliary heads), while layers such as
            normalisations stay in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    states = BufferStates(model)
    if training_branches:
        for module in modes:
            module.training = next(module.children(), None) is not None
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
        states.restore()


@contextmanager
def hooked(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
