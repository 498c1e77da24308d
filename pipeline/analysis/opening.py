"""Opens layers that hold several matrices, so that each can be narrowed or factorized; replayable from paths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgewright.models.layers.attention import OpenAttention
from edgewright.models.layers.channel_norm import ChannelNorm, treats_channels_alike
from edgewright.models.layers.recurrent import OpenRecurrent
from edgewright.models.layers.window_attention import OpenWindowAttention

from ..errors import CheckpointError
from .channels.modes import hooked, plain_eval


class Opened(Protocol):
    """A module that computes what one of PyTorch's or torchvision's does, made of layers."""

    @staticmethod
    def can_open(module: nn.Module) -> bool:
        """Whether `module` is one of those."""
        ...

    @classmethod
    def of(cls, module: Any) -> nn.Module:
        """One that computes what `module` computes, with copies of its weights."""
        ...


ATTENTION: tuple[type[Opened], ...] = (OpenAttention, OpenWindowAttention)
"""Of which whole heads can go."""
NORMS: tuple[type[Opened], ...] = (ChannelNorm,)
"""Normalisations of the user's own, of which channels can go."""
RECURRENT: tuple[type[Opened], ...] = (OpenRecurrent,)
"""Of which units can go, and input matrices be factors."""


@torch.no_grad()
def open_layers(
    model: nn.Module, inputs: Sequence[Tensor], kinds: Sequence[type[Opened]], exclude: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Replaces layers in place by others that are made of layers, if the outputs stay the same.

    Args:
        model: left as it is where its code needs what only the original layer has.
        inputs: of one row or some, positional.
        kinds: what to open.
        exclude: module paths, with ``*`` and ``?``, that stay.

    Returns:
        What stood there, by path.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    closed = {
        path: module
        for path, module in model.named_modules()
        if path
        and any(kind.can_open(module) for kind in kinds)
        and all(owners[id(p)] == 1 for p in module.parameters())
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    }
    if any(kind is ChannelNorm for kind in kinds):
        closed = _that_treat_channels_alike(model, inputs, closed)
    if not closed:
        return {}
    before = _outputs(model, inputs)
    if _stays_same(model, inputs, closed, before):
        return closed
    # one that cannot be opened keeps no other closed
    alone = len(closed) > 1
    return {
        path: module for path, module in closed.items() if alone and _stays_same(model, inputs, {path: module}, before)
    }


def _that_treat_channels_alike(
    model: nn.Module, inputs: Sequence[Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Those of `modules` that do, by what they are given in a run of the model."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
                seen.setdefault(path, args[0].detach().clone())

        return hook

    with hooked([module.register_forward_pre_hook(note(path)) for path, module in modules.items()]):
        _outputs(model, inputs)
    found = {}
    for path, module in modules.items():
        try:
            if path in seen and treats_channels_alike(module, seen[path]):
                found[path] = module
        except Exception:  # a user's module may count on its size; it stays as it is
            continue
    return found


def _stays_same(
    model: nn.Module, inputs: Sequence[Tensor], closed: Mapping[str, nn.Module], before: Sequence[Tensor]
) -> bool:
    """Opens what stands at the paths of `closed`, and closes it again if the outputs are others than `before`."""
    reopen(model, closed)
    try:
        same = all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(before, _outputs(model, inputs), strict=True)
        )
    except Exception:  # a user's forward may do anything with the closed layer; what cannot run opened stays closed
        same = False
    if not same:
        close(model, closed)
    return same


def reopen(model: nn.Module, paths: Iterable[str]) -> None:
    """Does in another copy of the model what `open_layers` did; what is open stays open.

    Raises:
        CheckpointError: there is no such layer at a path.
    """
    modules = dict(model.named_modules())
    kinds = (*ATTENTION, *RECURRENT, *NORMS)
    for path in paths:
        module = modules.get(path)
        kind = next((kind for kind in kinds if module is not None and kind.can_open(module)), None)
        if module is not None and kind is not None:
            _replace(model, module, kind.of(module))
        elif not any(isinstance(module, known) for known in kinds):
            raise CheckpointError(f"the edit opens {path!r}, which this model does not have: was it made for another?")


def close(model: nn.Module, closed: Mapping[str, nn.Module]) -> None:
    """Puts back what `open_layers` took out."""
    for path, module in closed.items():
        _replace(model, model.get_submodule(path), module)


def in_recurrent(model: nn.Module, path: str) -> bool:
    """Whether the layer at `path` belongs to an opened LSTM or GRU."""
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), OpenRecurrent) for i in range(1, len(parts)))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    with plain_eval(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
