"""Models of torchvision: ``torchvision:NAME``, for classification, segmentation, detection and video."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import torchvision_detection
from .library import Library, ModelInfo
from .python_source import did_you_mean, refuse_unknown_arguments

_PREFIX = "torchvision:"
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
_NOT_HERE = ("weights", "pretrained", "weights_backbone")
"""Arguments that fetch weights."""


class SegmentationLogits(nn.Module):
    """The logits [N, C, H, W] of a segmentation network of torchvision, which returns them under ``out``."""

    def __init__(self, model: nn.Module) -> None:
        """Wraps `model`, whose auxiliary classifier, if there is one, has no part in it."""
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """``[N, 3, H, W] -> [N, C, H, W]``, in training mode as in eval mode."""
        logits: Tensor = self.model(image)["out"]
        return logits


@dataclass(frozen=True)
class _Family:
    """What is done with the models of one of torchvision's rooms.

    Attributes:
        room: the module below ``torchvision.models``, empty for that itself.
        what: for people.
        adapter: makes of the library's model one that answers with a tensor.
    """

    room: str
    what: str
    adapter: Callable[[nn.Module], nn.Module] = lambda model: model

    def names(self) -> list[str]:
        """Of its models."""
        import torchvision

        module: types.ModuleType = getattr(torchvision.models, self.room) if self.room else torchvision.models
        names: list[str] = torchvision.models.list_models(module=module)
        # those that are quantized are no float models
        return [name for name in names if not name.startswith("quantized_")]


_FAMILIES = (
    _Family("", "images"),
    _Family("segmentation", "a class for each pixel", SegmentationLogits),
    _Family("video", "clips [N, 3, T, H, W]"),
)


def _names() -> list[str]:
    return [*(name for family in _FAMILIES for name in family.names()), *torchvision_detection.ANCHORED]


def _family_of(name: str) -> _Family | None:
    return next((family for family in _FAMILIES if name in family.names()), None)


def _info(name: str) -> ModelInfo:
    from torchvision.models import get_model_weights

    family = _family_of(name)
    weights = list(get_model_weights(name))
    meta = weights[0].meta if weights else {}
    side = getattr(getattr(weights[0], "transforms", None), "keywords", {}).get("crop_size") if weights else None
    count, classes = meta.get("num_params"), len(meta.get("categories", ()))
    described = f", {count / 1e6:.1f} M parameters with {classes} classes" if count else ""
    what = torchvision_detection.WHAT if family is None else family.what if family.room else ""
    kind = f", {what}" if what else ""
    side = torchvision_detection.ANCHORED.get(name, side)
    return ModelInfo(
        _PREFIX + name, f"torchvision{kind}{described}", (3, side, side) if isinstance(side, int) else None
    )


def _build(short: str, args: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model_builder

    name, family = _PREFIX + short, _family_of(short)
    if reason := torchvision_detection.refusal(short):
        raise ValueError(reason)
    if family is None and short not in torchvision_detection.ANCHORED:
        raise ValueError(
            f"torchvision has no model {short!r} for classification, segmentation, detection or video"
            f"{did_you_mean(short, _names())}; `edgewright models` lists them"
        )
    for key in _NOT_HERE:
        if key in args:
            raise ValueError(f"{name}: {key!r} is no model argument here: put a weights file under model.weights")
    if family is None:
        return torchvision_detection.build(short, args)
    builder = get_model_builder(short)
    accepted = _arguments(builder)
    refuse_unknown_arguments(args, accepted, name)
    defaults: dict[str, Any] = {}
    if "aux_logits" in accepted:
        # auxiliary classifiers would make forward return a tuple in training mode; with both given, no warning either
        defaults = {"aux_logits": False, "init_weights": True}
    if "weights_backbone" in inspect.signature(builder).parameters:
        defaults["weights_backbone"] = None  # the default fetches them
    try:
        model: nn.Module = builder(weights=None, **{**defaults, **args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {error}") from error
    return family.adapter(model)


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
    left = {"progress", "arch", *_NOT_HERE}
    return [k for k, p in found.items() if p.kind is not _VAR_KEYWORD and k not in left]


LIBRARY = Library(_PREFIX, _build, _names, _info)
