"""Models of torchvision: ``torchvision:NAME``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .library import Library, ModelInfo
from .python_source import did_you_mean, refuse_unknown_arguments

_PREFIX = "torchvision:"
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


def _names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _info(name: str) -> ModelInfo:
    from torchvision.models import get_model_weights

    weights = list(get_model_weights(name))
    transforms = getattr(weights[0], "transforms", None)
    side = getattr(transforms, "keywords", {}).get("crop_size")
    count = weights[0].meta.get("num_params") if weights else None
    description = f"torchvision, {count / 1e6:.1f} M parameters with 1000 classes" if count else "torchvision"
    return ModelInfo(_PREFIX + name, description, (3, side, side) if isinstance(side, int) else None)


def _build(short: str, args: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model_builder

    name, known = _PREFIX + short, _names()
    if short not in known:
        raise ValueError(
            f"torchvision has no classification model {short!r}{did_you_mean(short, known)}; "
            "`edgewright models` lists them"
        )
    for key in ("weights", "pretrained", "weights_backbone"):
        if key in args:
            raise ValueError(f"{name}: {key!r} is no model argument here: put a weights file under model.weights")
    builder = get_model_builder(short)
    accepted = _arguments(builder)
    refuse_unknown_arguments(args, accepted, name)
    # auxiliary classifiers would make forward return a tuple in training mode; with both given, no warning
    # either
    defaults = {"aux_logits": False, "init_weights": True} if "aux_logits" in accepted else {}
    try:
        model: nn.Module = builder(weights=None, **{**defaults, **args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {error}") from error
    return model


def _arguments(builder: Callable[..., Any]) -> list[str]:
    """Keyword arguments that a torchvision builder understands: its own, and those of the class it returns.

    Builders take ``**kwargs``, and some of the classes swallow unknown ones in silence; those read further
    names in functions of their module.
    """
    found = {k: p for k, p in inspect.signature(builder).parameters.items() if p.kind is not _VAR_KEYWORD}
    made = typing.get_type_hints(builder)["return"]
    of_class = inspect.signature(made).parameters
    found.update(of_class)
    if any(p.kind is _VAR_KEYWORD for p in of_class.values()):
        for function in vars(inspect.getmodule(made)).values():
            if inspect.isfunction(function) and function.__name__.startswith("_"):
                found = {**inspect.signature(function).parameters, **found}
    return [k for k, p in found.items() if p.kind is not _VAR_KEYWORD and k not in {"weights", "progress", "arch"}]


LIBRARY = Library(_PREFIX, _build, _names, _info)
