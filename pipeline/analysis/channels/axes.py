"""Which dimensions of which tensors are a layer's input and output channels; the only table of layer types.

Layers are of three kinds. *Mixing* layers (linear, dense and grouped convolutions) make new channels out of old ones:
they have an ``in`` and an ``out`` axis. *Following* layers (normalisation, PReLU, depthwise convolutions) hand
channel j on as channel j, so they are narrowed together with whoever makes it. Everything else has no axis here.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from edgewright.models.layers.channel_norm import ChannelNorm, axis_of

Side: TypeAlias = Literal["in", "out"]
"""An axis of a layer; following layers other than depthwise convolutions have ``out`` only."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_TRAILING_NORMS = (nn.LayerNorm, nn.RMSNorm)


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution of any kind."""
    return isinstance(module, _CONVOLUTIONS)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each input channel has filters of its own: a following layer."""
    return isinstance(module, _CONVOLUTIONS) and module.groups > 1 and module.groups == module.in_channels


def is_mixing(module: nn.Module) -> bool:
    """Whether `module` makes new channels out of all, or of a group, of those it reads."""
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not is_depthwise(module)


def has_derived_weight(module: nn.Module) -> bool:
    """Whether the weight is computed from other tensors: parametrizations, weight norm, pruning masks of PyTorch."""
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and module._parameters.get("weight") is None


def is_following(module: nn.Module) -> bool:
    """Whether output channel j comes from input channel j, and from statistics over the channels at most."""
    if isinstance(module, _TRAILING_NORMS):
        return len(module.normalized_shape) == 1
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if isinstance(module, ChannelNorm):
        return True
    return is_depthwise(module) or isinstance(module, (*_BATCH_NORMS, nn.GroupNorm))


def has_own_forward(module: nn.Module) -> bool:
    """Whether a layer of one of the types here computes in another way than PyTorch's."""
    if not (is_mixing(module) or is_following(module)) or isinstance(module, ChannelNorm):
        return False
    if "forward" in vars(module) or has_derived_weight(module):
        return True
    theirs: Any = next((kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")), None)
    return any(
        getattr(type(module), name, None) is not getattr(theirs, name, None) for name in ("forward", "_conv_forward")
    )


def has_statistics_over_channels(module: nn.Module) -> bool:
    """Whether removing one channel changes how the others are normalised."""
    return isinstance(module, (*_TRAILING_NORMS, ChannelNorm)) or (
        isinstance(module, nn.GroupNorm) and module.num_groups == 1
    )


def width(module: nn.Module, side: Side) -> int:
    """Number of channels along an axis of a mixing or following layer."""
    layer: Any = module
    if isinstance(module, nn.Linear):
        return int(layer.in_features if side == "in" else layer.out_features)
    if isinstance(module, _CONVOLUTIONS):
        return int(layer.in_channels if side == "in" else layer.out_channels)
    if isinstance(module, _TRAILING_NORMS):
        return int(layer.normalized_shape[0])
    if isinstance(module, nn.GroupNorm):
        return int(layer.num_channels)
    if isinstance(module, ChannelNorm):
        return module.channels
    return int(layer.num_parameters if isinstance(module, nn.PReLU) else layer.num_features)


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The dimension of `x`, an input or output of `module`, that holds channels."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    if isinstance(module, _TRAILING_NORMS):
        # subclasses that normalise images (ConvNeXt's LayerNorm2d) take channels first
        return x.dim() - 1 if x.shape[-1] == module.normalized_shape[0] else min(1, x.dim() - 1)
    if isinstance(module, _CONVOLUTIONS):
        return x.dim() - 1 - len(module.kernel_size)
    if isinstance(module, ChannelNorm):
        return module.channel_axis(x)
    return min(1, x.dim() - 1)


def block(module: nn.Module, side: Side) -> int:
    """Neighbouring channels that only go together: the channels of one group of a grouped layer, else 1."""
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return width(module, side) // module.groups
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        return module.num_channels // module.num_groups
    return 1


def sliced_tensors(module: nn.Module, derived: bool = False) -> list[tuple[str, int, Side]]:
    """(own parameter or buffer, dimension, axis) for all that is cut when an axis of `module` gets narrower.

    Args:
        module: any.
        derived: also a weight that is computed from other tensors.
    """
    found: list[tuple[str, int, Side]] = []
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        grouped = isinstance(module, _CONVOLUTIONS) and module.groups > 1
        out_dim, in_dim = (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)
        if not grouped:
            found = [("weight", out_dim, "out"), ("weight", in_dim, "in")]
        else:
            # the other dimension counts channels within one group and stays, because whole groups go
            found = [("weight", 0, "in" if isinstance(module, _TRANSPOSED) else "out")]
        if has_derived_weight(module) and not derived:
            found = []
        return found + ([("bias", 0, "out")] if module._parameters.get("bias") is not None else [])
    if isinstance(module, ChannelNorm):
        return [(name, axis_of(p), "out") for name, p in module._parameters.items() if p is not None]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
            found.append((name, 0, "out"))
    return found


def narrowed_attributes(module: nn.Module, kept: dict[Side, int]) -> dict[str, int | list[int]]:
    """Attributes of `module` after its axes have been narrowed to the numbers in `kept`; JSON-able."""
    if isinstance(module, nn.Linear):
        names: dict[Side, str] = {"in": "in_features", "out": "out_features"}
        return {names[side]: count for side, count in kept.items()}
    if isinstance(module, _CONVOLUTIONS):
        found: dict[str, int | list[int]] = {f"{side}_channels": count for side, count in kept.items()}
        if module.groups > 1:
            found["groups"] = module.groups * kept["out"] // module.out_channels
        return found
    if isinstance(module, _TRAILING_NORMS):
        return {"normalized_shape": [kept["out"]]}
    if isinstance(module, nn.GroupNorm):
        groups = 1 if module.num_groups == 1 else module.num_groups * kept["out"] // module.num_channels
        return {"num_channels": kept["out"], "num_groups": groups}
    if isinstance(module, ChannelNorm):
        return {}
    return {"num_parameters" if isinstance(module, nn.PReLU) else "num_features": kept["out"]}


def filters(module: nn.Module) -> Tensor:
    """The weight of a mixing layer as one row per output channel, [out, everything else]."""
    weight: Any = module.weight
    if not isinstance(module, _TRANSPOSED):
        rows: Tensor = weight.detach().flatten(1)
        return rows
    # [in, out / groups, ...]: inputs of group g make outputs of group g
    grouped = weight.detach().unflatten(0, (module.groups, -1)).transpose(1, 2)
    rows = grouped.flatten(0, 1).flatten(1)
    return rows
