"""Models by name: ``zoo:``, ``torchvision:``, ``timm:``, ``python:``; ``hf:``, ``gguf:``, ``packaged:`` of
transformers.

Another package offers models by an entry point of the group ``edgewright.models``. Its name is the prefix, ``acme:``;
it is a function that takes what stands behind the colon, and the model's ``args`` as keywords, and returns a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .sources import extensions, pretrained, timm_models, torchvision_models
from .sources.import_closure import import_closure
from .sources.library import Library, ModelInfo
from .sources.precision import in_float32
from .sources.python_source import (
    PREFIX,
    call,
    check_arguments,
    did_you_mean,
    load_object,
    place_of,
)
from .zoo import bottleneck, residual, vgg, vit

GROUP = "edgewright.models"
"""The group of entry points."""
_LIBRARIES = {library.prefix: library for library in (torchvision_models.LIBRARY, timm_models.LIBRARY)}


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
        name: ``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``python:...``, or a name of `pretrained`, whose
            weights come along.
        args: keyword arguments of the model.
        root: folder of the recipe, for ``python:``.
        notes: gets what the user should know of the model, if it is given.

    Raises:
        ValueError: an unknown name (with the nearest ones), arguments that do not fit (naming the argument),
            or a user's function that fails or does not return an `nn.Module`.
    """
    if name.startswith(PREFIX):
        return _build_python(name, args, root, notes)
    library, short = _library_of(name)
    if library is not None:
        return library.build(short, args)
    if name.startswith(pretrained.PREFIXES):
        return pretrained.build(name, args, root)
    entry = _ZOO.get(name.removeprefix("zoo:")) if name.startswith("zoo:") else None
    if entry is None and _offered(name) is not None:
        return _build_offered(name, args)
    if entry is None:
        known = [f"zoo:{short}" for short in _ZOO]
        known += [library.prefix + short for library in _LIBRARIES.values() for short in library.names()]
        same = [one for one in known if one.partition(":")[2] == name]
        near = did_you_mean(name, same or known)
        raise ValueError(
            f"unknown model {name!r}{near}; `edgewright models` lists the known ones, and "
            " python:path/to/file.py:function names your own"
        )
    check_arguments(entry.factory, args, name)
    try:
        return entry.factory(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built with {dict(args)!r}: {error}") from error


def available(contains: str = "") -> list[ModelInfo]:
    """Every model that can be built by name, zoo first; of large libraries one row, unless they are asked for.

    Args:
        contains: only names with this text; one that begins with a library's prefix lists all of that library.
    """
    found = [ModelInfo(f"zoo:{name}", e.description, e.input_shape) for name, e in _ZOO.items()]
    for library in _LIBRARIES.values():
        if library.summary is not None and not contains.startswith(library.prefix):
            found.append(library.summary())
        else:
            found += [library.info(name) for name in library.names() if contains in library.prefix + name]
    found += [
        ModelInfo(f"{prefix}:...", f"models of {extensions.where(GROUP, prefix)}", None)
        for prefix in sorted(extensions.offered(GROUP))
    ]
    return [info for info in found if contains in info.name]


def input_shape(name: str) -> tuple[int, ...] | None:
    """Shape of one row without the batch axis that the model called `name` expects by default, if known."""
    if name.startswith("zoo:") and name.removeprefix("zoo:") in _ZOO:
        return _ZOO[name.removeprefix("zoo:")].input_shape
    library, short = _library_of(name)
    if library is not None and short.partition(".")[0] in library.names():
        return library.info(short).input_shape
    return None


def sources(name: str, root: Path) -> tuple[Path, ...]:
    """Files whose content decides what `build` returns, for cache keys; libraries count by their version.

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


def _library_of(name: str) -> tuple[Library | None, str]:
    """The library of a name, and what stands behind its prefix."""
    prefix, colon, short = name.partition(":")
    return _LIBRARIES.get(prefix + colon), short


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
