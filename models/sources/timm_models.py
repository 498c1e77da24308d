"""Models of timm: ``timm:NAME``. Their weights come from a file that the user has, nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .library import Library, ModelInfo
from .python_source import did_you_mean

_PREFIX = "timm:"
_NETWORK = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of timm's own that load weights, most of them from the network."""


def _installed() -> bool:
    return importlib.util.find_spec("timm") is not None


def _names() -> list[str]:
    if not _installed():
        return []
    import timm

    names: list[str] = timm.list_models()
    return names


def _info(name: str) -> ModelInfo:
    import timm

    published = timm.get_pretrained_cfg(name)
    size = tuple(published.input_size) if published is not None and published.input_size else None
    described = "timm"
    if published is not None and published.has_weights:
        described = f"timm, published weights expect mean {_listed(published.mean)}, std {_listed(published.std)}"
    return ModelInfo(_PREFIX + name, described, size)


def _summary() -> ModelInfo:
    text = "timm is not installed: pip install 'edgewright[timm]'"
    if _installed():
        version = importlib.metadata.version("timm")
        text = (
            f"timm {version}, {len(_names())} architectures: `edgewright models timm:edge` lists those with that text"
        )
    return ModelInfo(f"{_PREFIX}...", text, None)


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}".rstrip("0") for value in values)


def _build(short: str, args: Mapping[str, Any]) -> nn.Module:
    name = _PREFIX + short
    if not _installed():
        raise ValueError(f"{name} needs the timm library: pip install 'edgewright[timm]'")
    import timm

    # a tag of published weights behind a dot says what size of input and how many classes are meant
    architecture, known = short.partition(".")[0], _names()
    if architecture not in known:
        raise ValueError(
            f"timm has no model {architecture!r}{did_you_mean(architecture, known)}; `edgewright models {_PREFIX}` "
            "lists them, and files of the hub are given under model.weights"
        )
    for key in _NETWORK:
        if key in args:
            raise ValueError(f"{name}: {key!r} is no model argument here: put a weights file under model.weights")
    try:
        model: nn.Module = timm.create_model(short, pretrained=False, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {type(error).__name__}: {error}") from error
    return model


LIBRARY = Library(_PREFIX, _build, _names, _info, _summary)
