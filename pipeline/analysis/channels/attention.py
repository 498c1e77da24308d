"""Opens the attention layers of PyTorch and torchvision, so that whole heads can go: replayable from paths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgewright.models.layers.attention import OpenAttention
from edgewright.models.layers.window_attention import OpenWindowAttention

from ...errors import CheckpointError
from .modes import plain_eval

_KINDS: tuple[type[OpenAttention] | type[OpenWindowAttention], ...] = (OpenAttention, OpenWindowAttention)


def open_attention(model: nn.Module, inputs: tuple[Tensor, ...], exclude: Iterable[str] = ()) -> list[str]:
    """Replaces attention layers in place by others that can be narrowed, if the outputs stay the same.

    Args:
        model: left as it is where its code needs what only the original layer has.
        inputs: one row, positional.
        exclude: module paths, with ``*`` and ``?``, that stay.

    Returns:
        Paths of the layers that were opened.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    paths = [
        path
        for path, module in model.named_modules()
        if any(kind.can_open(module) for kind in _KINDS)
        and all(owners[id(p)] == 1 for p in module.parameters())
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    ]
    if not paths:
        return []
    before = _outputs(model, inputs)
    closed = {path: model.get_submodule(path) for path in paths}
    reopen(model, paths)
    try:
        same = all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(before, _outputs(model, inputs), strict=True)
        )
    except Exception:  # a user's forward may do anything with the closed layer; what cannot run opened stays closed
        same = False
    if not same:
        for path, module in closed.items():
            _replace(model, model.get_submodule(path), module)
        return []
    return paths


def reopen(model: nn.Module, paths: Iterable[str]) -> None:
    """Does in another copy of the model what `open_attention` did.

    Raises:
        CheckpointError: there is no such layer at a path.
    """
    modules = dict(model.named_modules())
    for path in paths:
        module = modules.get(path)
        kind = next((kind for kind in _KINDS if module is not None and kind.can_open(module)), None)
        if module is None or kind is None:
            raise CheckpointError(
                f"the edit opens the attention layer {path!r}, which this model does not have: was it made for another?"
            )
        _replace(model, module, kind.of(module))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with plain_eval(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
