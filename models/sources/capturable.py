"""Forms of a transformers model that an exporter can read, for as long as one reads it.

The library computes some layers in ways that no graph can hold: a loop over the experts that this very input chose,
rotary factors that a Python branch exchanges when a text grows long. It knows other forms of the same arithmetic, and
these are set for the time of a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts as batched matrix products over the experts chosen, whatever they are; restored afterwards.

    Args:
        model: of the transformers library somewhere inside, or anything else, which stays as it is.
    """
    able: list[Any] = [m for m in model.modules() if callable(getattr(m, "set_experts_implementation", None))]
    # the outermost reaches those inside it
    held = [(m, m.get_experts_implementation()) for m in able[:1]]
    try:
        for module, _ in held:
            module.set_experts_implementation("batched_mm")
        yield
    finally:
        for module, before in held:
            module.set_experts_implementation(before)


@contextlib.contextmanager
def fixed_rotary(model: nn.Module) -> Iterator[None]:
    """Rotary factors as they are up to `rotary_limit`, whatever the length; restored afterwards.

    A cached key was rotated when it was read, so no file with a cache can exchange the factors later.
    """
    held: list[tuple[Any, Any]] = []
    try:
        for module, kinds in _rotary(model):
            held.append((module, module.rope_type))
            fixed = {layer: "default" if _follows_length(kind) else kind for layer, kind in kinds.items()}
            module.rope_type = fixed if isinstance(module.rope_type, Mapping) else fixed[None]
        yield
    finally:
        for module, before in held:
            module.rope_type = before


def rotary_limit(model: nn.Module) -> tuple[int, str] | None:
    """The longest sequence up to which the rotary factors stay the same, and why; None if they always do."""
    found = []
    for module, kinds in _rotary(model):
        for layer, kind in kinds.items():
            if not _follows_length(kind):
                continue
            settings = module.config.rope_parameters
            settings = settings if layer is None else settings[layer]
            limit = settings["original_max_position_embeddings"] if kind == "longrope" else module.original_max_seq_len
            found.append((int(limit), f"beyond them its rotary factors ({kind}) change, and cached keys keep the old"))
    return min(found, default=None)


def _rotary(model: nn.Module) -> Iterator[tuple[Any, dict[str | None, str]]]:
    """Modules that compute rotary factors, with the kind of their factors by type of layer (None: of all)."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            yield module, {None: kind}
        elif isinstance(kind, Mapping):
            yield module, dict(kind)


def _follows_length(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"
