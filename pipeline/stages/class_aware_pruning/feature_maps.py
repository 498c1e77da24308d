"""How alike the feature maps of channels are, as the layers that read them see them; needs no labels.

Measured behind normalisation and activation, because that is what another channel would have to stand in for. Second
moments are summed up batch by batch; no feature map outlives its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.channels.axes import channel_dim, is_mixing
from ...analysis.channels.flow import Axis
from ...analysis.channels.groups import ChannelGroup
from ...analysis.channels.modes import hooked, plain_eval
from ...errors import StageError
from ...stage import Context
from ...task import Split

ROWS = 512
"""Samples that are looked at, spread evenly over the split (METHODS §6)."""
_CELLS = 4  # per side, of a pooled map
_CONSTANT = 1e-10  # share of the mean square that a variance is lost below


@dataclass(frozen=True)
class Moments:
    """Of the U units of one group at one layer.

    Attributes:
        mean: float64 [U].
        covariance: float64 [U, U].
    """

    mean: Tensor
    covariance: Tensor

    @property
    def constant(self) -> Tensor:
        """Bool [U]: units whose maps are the same number everywhere."""
        variance = self.covariance.diagonal()
        return variance <= _CONSTANT * (variance + self.mean.square())

    @property
    def correlation(self) -> Tensor:
        """Size of the correlation of every two units, float64 [U, U] in 0 ... 1; 0 for a unit with itself and for
        constant ones."""
        scale = self.covariance.diagonal().clamp_min(0.0).sqrt()
        scale = torch.where(self.constant, torch.inf, scale)
        found = (self.covariance / scale / scale[:, None]).abs().clamp_max(1.0)
        return found.fill_diagonal_(0.0)


def places(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> list[Axis]:
    """Where the maps of a group are looked at: inputs of the layers that mix them; its producers' outputs if none
    does."""
    readers = [axis for axis in group.members if axis[1] == "in" and axis[0] in modules and is_mixing(modules[axis[0]])]
    return readers or [(path, "out") for path in group.producers]


def collect_moments(
    model: nn.Module, groups: Sequence[ChannelGroup], split: Split, batch_size: int, context: Context
) -> dict[str, dict[Axis, Moments]]:
    """Per group and place the moments over samples and positions, in eval mode, without changing the model.

    Args:
        model: takes the split's inputs positionally.
        groups: of channels.
        split: where the samples come from.
        batch_size: samples in one forward pass; changes nothing but memory and time.
        context: device and progress.

    Raises:
        StageError: a map with NaN or infinity.
    """
    modules = dict(model.named_modules())
    sums: dict[tuple[str, Axis], _Sums] = {}
    handles = []
    for group in groups:
        for axis in places(group, modules):
            place = sums[group.name, axis] = _Sums(modules[axis[0]], group.members[axis])
            module = modules[axis[0]]
            handles.append(
                module.register_forward_pre_hook(place.before())
                if axis[1] == "in"
                else module.register_forward_hook(place.behind())
            )
    rows = min(len(split), ROWS)
    chosen = [i * len(split) // rows for i in range(rows)]
    starts = range(0, rows, batch_size)
    model.to(context.device)
    with hooked(handles), plain_eval(model), torch.no_grad():
        for start in context.progress.track(starts, "comparing feature maps", len(starts)):
            batch = split.batch(chosen[start : start + batch_size]).to(context.device)
            model(*batch.inputs)
    model.to("cpu")
    found: dict[str, dict[Axis, Moments]] = {}
    for (name, axis), place in sums.items():
        found.setdefault(name, {})[axis] = place.moments(axis[0])
    return found


def correlations(groups: Sequence[ChannelGroup], moments: Mapping[str, Mapping[Axis, Moments]]) -> dict[str, Tensor]:
    """What a criterion gets of every producer with F filters, float64 [F, F]: see `ScoredLayer.correlation`.

    Two units are as alike as they are to the layer that finds them least so.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        here = list(moments[group.name].values())
        alike = torch.stack([m.correlation for m in here]).amin(dim=0)
        # a unit that is the same number for every reader is no loss at all, and no stand-in either
        still = torch.stack([m.constant for m in here]).all(dim=0)
        alike.fill_diagonal_(0.0).diagonal()[still] = 1.0
        for path in group.producers:
            channels = group.members[(path, "out")]
            units, width = channels.shape
            flat = channels.flatten()
            size = max(int(flat.max()) + 1, len(found[path]) if path in found else 0)
            whole = torch.zeros(size, size, dtype=torch.float64)
            if path in found:
                whole[: len(found[path]), : len(found[path])] = found[path]
            spread = alike[:, None, :, None].expand(units, width, units, width).reshape(len(flat), len(flat))
            # channels of one unit go together: none can take the other's place
            same = torch.eye(units).repeat_interleave(width, 0).repeat_interleave(width, 1) - torch.eye(len(flat))
            whole[flat[:, None], flat] = spread.masked_fill(same.bool(), 0.0)
            found[path] = whole
    return found


class _Sums:
    """Of the maps of one group's units at one layer: count, sums and sums of products."""

    def __init__(self, module: nn.Module, channels: Tensor) -> None:
        self.module, self.channels = module, channels
        units = len(channels)
        self.count = 0
        self.first = torch.zeros(units, dtype=torch.float64)
        self.second = torch.zeros(units, units, dtype=torch.float64)

    def before(self) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook for inputs."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.add(inputs[0])

        return hook

    def behind(self) -> Callable[[nn.Module, Any, Any], None]:
        """A hook for outputs."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.add(output)

        return hook

    def add(self, x: Tensor) -> None:
        """Takes in one input or output of the layer."""
        units, width = self.channels.shape
        maps = x.detach().movedim(channel_dim(self.module, x), 1) if x.dim() > 1 else x.detach()[None]
        maps = maps.index_select(1, self.channels.flatten().to(x.device))
        maps = _pooled(maps.flatten(2, -1) if maps.dim() not in (2, 4) else maps)
        values = maps.reshape(len(maps), units, width, -1).permute(0, 2, 3, 1).reshape(-1, units).to(torch.float64)
        self.count += len(values)
        self.first += values.sum(dim=0).cpu()
        self.second += (values.T @ values).cpu()

    def moments(self, path: str) -> Moments:
        """After the last batch."""
        if not torch.isfinite(self.second).all():
            raise StageError(
                f"layer {path!r} has NaN or infinite feature maps: the model or its inputs are out of range"
            )
        mean = self.first / max(1, self.count)
        return Moments(mean, self.second / max(1, self.count) - torch.outer(mean, mean))


def _pooled(maps: Tensor) -> Tensor:
    """At most 4 x 4 cells of [N, C, H, W] or 16 of [N, C, positions]; [N, C] as it is."""
    if maps.dim() == 4 and max(maps.shape[2:]) > _CELLS:
        height, width = (min(size, _CELLS) for size in maps.shape[2:])
        return nn.functional.adaptive_avg_pool2d(maps.float(), (height, width))
    if maps.dim() == 3 and maps.shape[2] > _CELLS**2:
        return nn.functional.adaptive_avg_pool1d(maps.float(), _CELLS**2)
    return maps
