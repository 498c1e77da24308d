"""Models by name: ``zoo:``, ``torchvision:``, ``python:``, and ``hf:``, ``gguf:``, ``packaged:`` of transformers.

Another package offers models by an entry point of the group ``edgewright.models``. Its name is the prefix, ``acme:``;
it is a function that takes what stands behind the colon, and the model's ``args`` as keywords, and returns a module.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .sources import extensions, pretrained
from .sources.import_closure import import_closure
from .sources.precision import in_float32
from .sources.python_source import (
    PREFIX,
    call,
    check_arguments,
    did_you_mean,
    load_object,
    place_of,
    refuse_unknown_arguments,
)
from .zoo import bottleneck, residual, vgg, vit

GROUP = "edgewright.models"
"""The group of entry points."""
_TORCHVISION = "torchvision:"
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


@dataclass(frozen=True)
class ModelInfo:
    """One row of ``edgewright models``.

    Attributes:
        name: as recipes write it.
        description: one line.
        input_shape: of one row without the batch axis, as the default arguments expect it; None if not known.
    """

    name: str
    description: str
    input_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., nn.Module]
    description: str
    input_shape: tuple[int, ...]


_ZOO: dict[str, _Entry] = {
    "resnet_small": _Entry(
        residual.resnet_small,
        "small residual CNN, three stages of basic blocks with wide inner convolutions",
        (1, 32, 32),
    ),
    "resnet56": _Entry(residual.resnet56, "ResNet-56 for CIFAR, zero-padded shortcuts, 125 MMACs", (3, 32, 32)),
    "resnet50_cifar": _Entry(
        bottleneck.resnet50_cifar, "ResNet-50 with a 3x3 stem for 32x32 images, 1.3 GMACs", (3, 32, 32)
    ),
    "vggsmall": _Entry(vgg.vggsmall, "six convolutions and three linear layers, 617 MMACs", (3, 32, 32)),
    "vgg16": _Entry(vgg.vgg16, "VGG-16 for CIFAR with batch norm and a 512-512 classifier, 313 MMACs", (3, 32, 32)),
    "vgg19": _Entry(vgg.vgg19, "VGG-19 for CIFAR with batch norm and one linear layer, 398 MMACs", (3, 32, 32)),
    "vit_small": _Entry(vit.vit_small, "small pre-norm vision transformer, separate q, k, v projections", (3, 32, 32)),
}


def build(name: str, args: Mapping[str, Any], root: Path, notes: list[str] | None = None) -> nn.Module:
    """Makes the model called `name` with fresh weights, in float32; deterministic under `torch.manual_seed`.

    Args:
        name: ``zoo:NAME``, ``torchvision:NAME``, ``python:...``, or a name of `pretrained`, whose weights come along.
        args: keyword arguments of the model.
        root: folder of the recipe, for ``python:``.
        notes: gets what the user should know of the model, if it is given.

    Raises:
        ValueError: an unknown name (with the nearest ones), arguments that do not fit (naming the argument),
            or a user's function that fails or does not return an `nn.Module`.
    """
    if name.startswith(PREFIX):
        return _build_python(name, args, root, notes)
    if name.startswith(_TORCHVISION):
        return _build_torchvision(name, args)
    if name.startswith(pretrained.PREFIXES):
        return pretrained.build(name, args, root)
    entry = _ZOO.get(name.removeprefix("zoo:")) if name.startswith("zoo:") else None
    if entry is None and _offered(name) is not None:
        return _build_offered(name, args)
    if entry is None:
        near = did_you_mean(name, [info.name for info in available()])
        raise ValueError(
            f"unknown model {name!r}{near}; `edgewright models` lists the known ones, and "
            " python:path/to/file.py:function names your own"
        )
    check_arguments(entry.factory, args, name)
    try:
        return entry.factory(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {error}") from error


def available() -> list[ModelInfo]:
    """Every model that can be built by name, zoo first."""
    zoo = [ModelInfo(f"zoo:{name}", e.description, e.input_shape) for name, e in _ZOO.items()]
    offered = [
        ModelInfo(f"{prefix}:...", f"models of {extensions.where(GROUP, prefix)}", None)
        for prefix in sorted(extensions.offered(GROUP))
    ]
    return zoo + [_torchvision_info(name) for name in _torchvision_names()] + offered


def input_shape(name: str) -> tuple[int, ...] | None:
    """Shape of one row without the batch axis that the model called `name` expects by default, if known."""
    if name.startswith("zoo:") and name.removeprefix("zoo:") in _ZOO:
        return _ZOO[name.removeprefix("zoo:")].input_shape
    if name.startswith(_TORCHVISION) and name.removeprefix(_TORCHVISION) in _torchvision_names():
        return _torchvision_info(name.removeprefix(_TORCHVISION)).input_shape
    return None


def sources(name: str, root: Path) -> tuple[Path, ...]:
    """Files whose content decides what `build` returns, for cache keys; torchvision counts by its version.

    Args:
        name: see `build`.
        root: folder of the recipe.

    Raises:
        ValueError: a ``python:`` reference that cannot be loaded.
    """
    if name.startswith(PREFIX):
        return load_object(name, root).sources
    if name.startswith(pretrained.PREFIXES):
        return pretrained.sources(name, root)
    entry = _ZOO.get(name.removeprefix("zoo:")) if name.startswith("zoo:") else None
    if entry is None:
        prefix = _offered(name)
        return () if prefix is None else extensions.files_of(GROUP, prefix)
    folder = Path(__file__).resolve().parent
    return import_closure(Path(inspect.getfile(entry.factory)), (folder.parent,))


def _offered(name: str) -> str | None:
    """The prefix of a model that another package offers."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in extensions.offered(GROUP) else None


def _build_offered(name: str, args: Mapping[str, Any]) -> nn.Module:
    prefix, _, rest = name.partition(":")
    function = extensions.load(GROUP, prefix)
    try:
        model = function(rest, **args)
    except Exception as error:  # another package's function may raise anything, and the user has to know which
        raise ValueError(f"{name} failed{place_of(error)}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}; a model is a torch.nn.Module")
    return model


def _build_python(name: str, args: Mapping[str, Any], root: Path, notes: list[str] | None) -> nn.Module:
    loaded = load_object(name, root)
    check_arguments(loaded.object, args, name)
    try:
        model = call(name, args, root)
    except Exception as error:
        raise ValueError(f"{name} failed{place_of(error)}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}; a model is a torch.nn.Module: return the model")
    halves = in_float32(model)
    if halves and notes is not None:
        kinds = " and ".join(str(dtype).removeprefix("torch.") for dtype in halves)
        notes.append(
            f"{name} comes with {kinds} weights: they are taken as float32, with the same values, and the model is "
            "trained, compared and exported in float32"
        )
    return model


def _torchvision_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_info(name: str) -> ModelInfo:
    from torchvision.models import get_model_weights

    weights = list(get_model_weights(name))
    transforms = getattr(weights[0], "transforms", None)
    side = getattr(transforms, "keywords", {}).get("crop_size")
    count = weights[0].meta.get("num_params") if weights else None
    description = f"torchvision, {count / 1e6:.1f} M parameters with 1000 classes" if count else "torchvision"
    return ModelInfo(_TORCHVISION + name, description, (3, side, side) if isinstance(side, int) else None)


def _build_torchvision(name: str, args: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model_builder

    short, known = name.removeprefix(_TORCHVISION), _torchvision_names()
    if short not in known:
        raise ValueError(
            f"torchvision has no classification model {short!r}{did_you_mean(short, known)}; "
            "`edgewright models` lists them"
        )
    for key in ("weights", "pretrained", "weights_backbone"):
        if key in args:
            raise ValueError(f"{name}: {key!r} is no model argument here: put a weights file under model.weights")
    builder = get_model_builder(short)
    accepted = _torchvision_arguments(builder)
    refuse_unknown_arguments(args, accepted, name)
    # auxiliary classifiers would make forward return a tuple in training mode; with both given, no warning
    # either
    defaults = {"aux_logits": False, "init_weights": True} if "aux_logits" in accepted else {}
    try:
        model: nn.Module = builder(weights=None, **{**defaults, **args})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {error}") from error
    return model


def _torchvision_arguments(builder: Callable[..., Any]) -> list[str]:
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
