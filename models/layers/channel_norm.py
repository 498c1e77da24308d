"""Normalisations of a user's own: each channel by itself, and by what all of them together say (ConvNeXt V2's GRN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sources.module_state import copied


class ChannelNorm(nn.Module):
    """Marks a module whose output channel comes from the input channel of the same number, from its own entries of the
    module's parameters, and from statistics over the channels; so channels can go.

    It stands in the bases of a class that is made for the module, whose forward stays as it is.
    """

    @staticmethod
    def can_open(module: nn.Module) -> bool:
        """Whether the parameters of `module` are one number for each channel, and nothing else is in it."""
        sizes = {channels_of(p) for p in module._parameters.values() if p is not None}
        return (
            not type(module).__module__.startswith("torch.nn.")
            and not isinstance(module, ChannelNorm)
            and not module._modules
            and all(buffer is None for buffer in module._buffers.values())
            and len(sizes) == 1
            and None not in sizes
        )

    @classmethod
    def of(cls, module: Any) -> ChannelNorm:
        """A copy of `module` that is marked."""
        kind = type(module)
        new = copied(module)
        new.__class__ = type(kind.__name__, (cls, kind), {"__module__": kind.__module__})
        assert isinstance(new, ChannelNorm)
        return new

    @property
    def channels(self) -> int:
        """Number of channels."""
        return next(size for p in self._parameters.values() if p is not None and (size := channels_of(p)))

    def channel_axis(self, x: Tensor) -> int:
        """The axis of `x`, an input or output, that has a place for each channel.

        Of several such the one that the parameters' shape says, else the last.
        """
        places = [axis for axis in range(1, x.dim()) if x.shape[axis] == self.channels]
        for parameter in self._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                said = x.dim() - parameter.dim() + axis_of(parameter)
                return said if said in places else x.dim() - 1
        return places[-1] if places else x.dim() - 1


def channels_of(parameter: Tensor) -> int | None:
    """Places along the only axis that has several; None where there is another number of such axes."""
    several = [size for size in parameter.shape if size > 1]
    return several[0] if len(several) == 1 and parameter.is_floating_point() else None


def axis_of(parameter: Tensor) -> int:
    """The only axis that has several places."""
    return next(axis for axis, size in enumerate(parameter.shape) if size > 1)


@torch.no_grad()
def treats_channels_alike(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` mixes channels as a normalisation does: in another order they give the same numbers.

    Args:
        module: `ChannelNorm.can_open` holds; unchanged.
        x: an input that it had.
    """
    norm = ChannelNorm.of(module).eval()
    axis, count = norm.channel_axis(x), norm.channels
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        # numbers of a fresh module may be all alike
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    order = torch.randperm(count, generator=generator)
    other, fewer = copied(norm), copied(norm)
    for name, own in norm.named_parameters(recurse=False):
        at = axis_of(own)
        other._parameters[name] = nn.Parameter(own.index_select(at, order))
        fewer._parameters[name] = nn.Parameter(own.narrow(at, 0, max(1, count // 2)).clone())
    whole, marked = norm(x), x.clone()
    marked.select(axis, 0).fill_(float("nan"))
    if not isinstance(whole, Tensor) or whole.shape != x.shape or not torch.isnan(norm(marked)).all():
        return False  # channels that do not touch each other need no mark
    moved = other(x.index_select(axis, order))
    narrow = fewer(x.narrow(axis, 0, max(1, count // 2)))
    scale = float(whole.abs().max().clamp(min=1e-6))
    same = torch.allclose(moved, whole.index_select(axis, order), rtol=1e-4, atol=1e-5 * scale)
    return same and narrow.shape[axis] == max(1, count // 2) and bool(torch.isfinite(narrow).all())
