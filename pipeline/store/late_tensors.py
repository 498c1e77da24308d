"""Tensors that a model registers at its first call: a checkpoint has them, a model that was just built does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..stage import Json


def late_tensors(called: nn.Module, fresh: nn.Module) -> dict[str, Json]:
    """What the state of `called` has and that of `fresh`, the same model before its first call, does not have yet.

    Returns:
        By name ``{"kind": "buffer" | "parameter", "shape": [...], "dtype": "float32"}``.
    """
    before = fresh.state_dict().keys()
    parameters = {name for name, _ in called.named_parameters(remove_duplicate=False)}
    return {
        name: {
            "kind": "parameter" if name in parameters else "buffer",
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        for name, value in called.state_dict().items()
        if name not in before
    }


def register_late(model: nn.Module, late: Mapping[str, Json]) -> nn.Module:
    """Registers what `late_tensors` found, with zeros, on a model that was just built: values come with a state.

    Raises:
        ValueError: there is no such module, or the name means something else there.
    """
    for name, what in late.items():
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"{name!r}, which its first call made, has no place in it") from None
        if getattr(module, leaf, None) is not None:
            raise ValueError(f"{name!r}, which its first call made, is a {type(getattr(module, leaf)).__name__} in it")
        value = torch.zeros(what["shape"], dtype=getattr(torch, what["dtype"]))
        vars(module).pop(leaf, None)  # an attribute that is None until the first call
        if what["kind"] == "parameter":
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
        else:
            module.register_buffer(leaf, value)
    return model
