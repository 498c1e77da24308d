"""Opens the LSTMs and GRUs of a model, so that their input matrices can be factors; replayable from paths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgewright.models.layers.recurrent import OpenRecurrent

from ...analysis.layers import replace_module
from ...errors import CheckpointError
from .fitting import Outcome


@torch.no_grad()
def open_recurrent(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Replaces LSTMs and GRUs in place by `OpenRecurrent`, if the outputs stay the same.

    Args:
        model: in eval mode; left as it is where its code needs what only the original layer has.
        inputs: of some rows, positional.

    Returns:
        What stood there, by path.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    closed = {
        path: module
        for path, module in model.named_modules()
        if path and OpenRecurrent.can_open(module) and all(owners[id(p)] == 1 for p in module.parameters())
    }
    if not closed:
        return {}
    before = _outputs(model, inputs)
    reopen(model, closed)
    try:
        same = all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(before, _outputs(model, inputs), strict=True)
        )
    except Exception:  # a user's forward may do anything with the closed layer: packed sequences, its own weights
        same = False
    if not same:
        close(model, closed)
        return {}
    return closed


def reopen(model: nn.Module, paths: Iterable[str]) -> None:
    """Does in another copy of the model what `open_recurrent` did; what is open stays open.

    Raises:
        CheckpointError: there is no such layer at a path.
    """
    modules = dict(model.named_modules())
    for path in paths:
        module = modules.get(path)
        if isinstance(module, OpenRecurrent):
            continue
        if module is None or not OpenRecurrent.can_open(module):
            raise CheckpointError(
                f"the edit opens the LSTM or GRU {path!r}, which this model does not have: was it made for another?"
            )
        replace_module(model, path, OpenRecurrent.of(module))


def close(model: nn.Module, closed: Mapping[str, nn.Module]) -> None:
    """Puts back what `open_recurrent` took out."""
    for path, module in closed.items():
        replace_module(model, path, module)


def in_recurrent(model: nn.Module, path: str) -> bool:
    """Whether the layer at `path` belongs to an opened LSTM or GRU."""
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), OpenRecurrent) for i in range(1, len(parts)))


def with_opened(outcome: Outcome, closed: Mapping[str, nn.Module]) -> Outcome:
    """`outcome` with the paths of the LSTMs and GRUs that it factorizes, and a note of what stays whole in them."""
    members = [path for group in outcome.data["groups"] for path in group["members"]]
    opened = [path for path in closed if any(member.startswith(f"{path}.") for member in members)]
    if not opened:
        return outcome
    whole = sum(
        parameter.numel() * parameter.element_size()
        for path in opened
        for name, parameter in closed[path].named_parameters()
        if name.startswith("weight_hh")
    )
    note = (
        f"of {', '.join(map(repr, opened))} the input matrices are factors; the recurrent ones ({whole} bytes) stay "
        "whole: an ONNX LSTM or GRU has no place for factors of them"
    )
    return Outcome({**outcome.data, "opened": opened, "notes": [*outcome.data["notes"], note]}, outcome.tensors)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
