"""What an optimizer remembers, as JSON and named tensors: states of training hold no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PREFIX = "optimizer."


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scalars by ``index.key``, and tensors by ``optimizer.index.key``."""
    scalars: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{_PREFIX}{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = value
    return scalars, tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` gave; other tensors are passed over."""
    entries: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(_PREFIX):
            index, field = key.removeprefix(_PREFIX).split(".", 1)
            entries.setdefault(int(index), {})[field] = value
    for key, value in scalars.items():
        index, field = key.split(".", 1)
        entries.setdefault(int(index), {})[field] = value
    whole = optimizer.state_dict()
    whole["state"] = entries
    optimizer.load_state_dict(whole)
