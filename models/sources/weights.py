"""Loading a user's weights file into a model; nothing is ever unpickled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Loads a state dict into `model`, strictly.

    Read are ``.safetensors``, and what `torch.save` wrote if it holds tensors only (``weights_only=True``):
    a state dict, or one under ``state_dict``, ``model_state_dict`` or ``model``. A prefix that all keys
    share because the model was saved inside a wrapper (``module.`` of DataParallel, ``_orig_mod.`` of
    compile, ``model.``) is taken off. A tied weight that the file holds under one of its names is enough.
    Batch-norm counters may be missing.

    Args:
        model: changed in place.
        path: the file.

    Returns:
        Keys of the file that were left out because they belong to a part which this model was built without
        (e.g. auxiliary classifiers).

    Raises:
        ValueError: the file is missing, damaged or holds Python objects; keys are missing, unexpected or of
            another shape (the first ones are named); or a weight is NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    state = _without_prefix(_state_dict(_read(path), path), model)
    own = model.state_dict()
    switched_off = _switched_off(model)
    unused = tuple(key for key in state if key not in own and key.startswith(switched_off))
    _refuse_misfits({k: v for k, v in state.items() if k not in unused}, own, path)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path}: weight {key!r} holds NaN or infinity; the training that wrote it diverged")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return unused


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}): save or copy it again") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, KeyError, UnicodeDecodeError, ...
        raise ValueError(f"{path} {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is that `torch.load` does not read; torch's own advice is to unpickle it, which is no advice."""
    convert = (
        "Where it can be loaded, convert it: `safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')` "
        "or `torch.save(model.state_dict(), 'weights.pt')`"
    )
    with path.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        return "is a safetensors file by its first bytes: give it the ending .safetensors"
    if not head.startswith((b"PK", b"\x80")):
        what = "is empty" if not head else "is no file that torch.save wrote"
        return f"{what}: save it again with `torch.save(model.state_dict(), 'weights.pt')`"
    if type(error).__name__ == "UnpicklingError":  # by name, because this package imports no pickle
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({found[1]})" if found else ""
        return f"holds Python objects{named} and not tensors only, and those are never unpickled here. {convert}"
    reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
    return f"is damaged or truncated: copy or save it again ({reason})"


def _state_dict(data: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping) or not data:
        kind = "nothing" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise ValueError(f"{path} holds {kind}, not a state dict: save model.state_dict()")
    for key, value in data.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: the entry {key!r} is a {type(value).__name__}, not a tensor: save "
                f"model.state_dict() alone, or under one of the keys {', '.join(_WRAPPERS)}"
            )
    return dict(data)


def _without_prefix(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = set(model.state_dict())
    found = True
    while found and not own & set(state):
        found = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                found = True
    return state


def _switched_off(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of submodules that a class knows and this instance lacks: plain attributes set to None."""
    return tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if value is None and not name.startswith("_")
    )


def _refuse_misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    places = {(own[k].data_ptr(), own[k].shape) for k in state if k in own and own[k].numel()}
    missing = [
        key
        for key, value in own.items()
        if key not in state
        and not key.endswith("num_batches_tracked")
        and (value.data_ptr(), value.shape) not in places
    ]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{k!r} is {list(state[k].shape)} in the file and {list(own[k].shape)} in the model"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    parts = [
        _first("missing in the file", map(repr, missing), len(missing)),
        _first("not in the model", map(repr, unexpected), len(unexpected)),
        _first("of another shape", shapes, len(shapes)),
    ]
    if any(parts):
        raise ValueError(
            f"the weights in {path} do not fit the model: {'; '.join(filter(None, parts))}. "
            "Check the model's name and args against what was trained"
        )


def _first(what: str, entries: Iterable[str], count: int) -> str:
    shown = [entry for entry, _ in zip(entries, range(_SHOWN), strict=False)]
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{what}: {', '.join(shown)}{more}" if shown else ""
