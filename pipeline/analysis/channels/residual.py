"""Which layers' channels are added up: the streams of residual networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.models.sources.module_state import copied

from .axes import channel_dim, is_following, is_mixing
from .flow import OUTPUT, Axis, Flow
from .groups import ChannelGroup
from .modes import hooked, plain_eval


def streams(model: nn.Module, inputs: tuple[Tensor, ...], groups: Sequence[ChannelGroup], flow: Flow) -> frozenset[str]:
    """Names of the groups of which two producers are added.

    A gate is no sum: with one factor at zero, the other has no influence. Producers of one position beside others of
    many (squeeze-and-excitation, conditioning vectors) are no streams.
    """
    bare: nn.Module | None = None
    found = set()
    for group in groups:
        apart = [path for path in group.producers if (path, "out") not in flow.along]
        spread = [path for path in apart if flow.calls[path].positions > 1]
        full = spread or apart
        if len(full) < 2:
            continue
        bare = bare or _without_shifts(model)
        if any(_added(bare, inputs, flow, one, other) for one, other in itertools.combinations(full, 2)):
            found.add(group.name)
    return frozenset(found)


def _without_shifts(model: nn.Module) -> nn.Module:
    """A copy in which zeros stay zeros on their way to the place where two streams meet."""
    bare = copied(model)
    for module in bare.modules():
        if is_following(module) or is_mixing(module):
            for name in ("bias", "running_mean"):
                shift = getattr(module, name, None)
                if isinstance(shift, Tensor):
                    shift.detach().zero_()
    return bare


def _added(bare: nn.Module, inputs: tuple[Tensor, ...], flow: Flow, one: str, other: str) -> bool:
    meet = _meeting(bare, flow, (one, "out"), (other, "out"))
    return bool(meet) and _influence(bare, inputs, one, other, meet) and _influence(bare, inputs, other, one, meet)


def _meeting(model: nn.Module, flow: Flow, one: Axis, other: Axis) -> dict[str, Tensor]:
    """The mixing layers that read both sources in the same channels, and these channels."""
    modules = dict(model.named_modules())
    meet: dict[str, Tensor] = {}
    for axis in flow.feeds[one].keys() & flow.feeds[other].keys():
        both = ((flow.feeds[one][axis] >= 0) & (flow.feeds[other][axis] >= 0)).nonzero().flatten()
        if len(both) and axis != OUTPUT and is_mixing(modules[axis[0]]):
            meet[axis[0]] = both
    return dict(sorted(meet.items()))


@torch.no_grad()
def _influence(
    model: nn.Module, inputs: tuple[Tensor, ...], silent: str, changed: str, readers: Mapping[str, Tensor]
) -> bool:
    """Whether channels of the readers depend on layer `changed` while layer `silent` gives zeros."""
    modules = dict(model.named_modules())

    def zeros(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def seen_with(seed: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)

        def note(path: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, args: Any) -> None:
                dim = channel_dim(module, args[0])
                seen.append(args[0].index_select(dim, readers[path].to(args[0].device)).clone())

            return hook

        handles = [modules[silent].register_forward_hook(zeros), modules[changed].register_forward_hook(noise)]
        handles += [modules[path].register_forward_pre_hook(note(path)) for path in readers]
        with plain_eval(model), hooked(handles):
            model(*inputs)
        return seen

    try:
        one, other = seen_with(0), seen_with(1)
    except Exception:  # noise is no place in a user's table; taken for a stream, it is left alone
        return True
    # a reader that runs before `changed` sees the same both times
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
