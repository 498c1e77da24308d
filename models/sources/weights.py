"""Loading a user's weights file into a model; nothing is ever unpickled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .weight_keys import mapped

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3
_DEQUANTIZE = "save the weights of the float model, or dequantize them first (`.dequantize()`)"


@dataclass(frozen=True)
class Loaded:
    """How a weights file was read.

    Attributes:
        unused: keys of the file that were left out because they belong to a part which this model was built without
            (e.g. auxiliary classifiers).
        notes: what the user should know of it.
    """

    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_weights(model: nn.Module, path: Path) -> Loaded:
    """Loads a state dict into `model`, strictly.

    Read are ``.safetensors``, and what `torch.save` wrote if it holds tensors only (``weights_only=True``):
    a state dict, or one under ``state_dict``, ``model_state_dict`` or ``model``, or the only one in the file. Where the
    model was saved inside a wrapper, or the wrapper's inside, the keys are mapped if one mapping fits all of them (see
    `weight_keys`). A tied weight that the file holds under one of its names is enough. Batch-norm counters may be
    missing.

    Args:
        model: changed in place.
        path: the file.

    Returns:
        What was left out, and how keys were mapped.

    Raises:
        ValueError: the file is missing, damaged or holds Python objects; a tensor is sparse, quantized, complex or
            without data; keys are missing, unexpected or of another shape (the first ones are named); or a weight is
            NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    given, notes = _state_dict(_read(path), path)
    own = model.state_dict()
    switched_off = _switched_off(model)

    def wanted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key in own or not key.startswith(switched_off)}

    found = mapped(given, list(own), lambda state: not _misfits(wanted(state), own))
    if found is None:
        raise ValueError(
            f"the weights in {path} do not fit the model: {'; '.join(_misfits(wanted(given), own))}. "
            f"{_part_of(given, own)}Check the model's name and args against what was trained"
        )
    state = found.state
    for key, value in state.items():
        _refuse_other_kind(key, value, own.get(key), path)
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise ValueError(f"{path}: weight {key!r} holds NaN or infinity; the training that wrote it diverged")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    unused = tuple(key for key in state if key not in own)
    said = [f"{path.name}: {note}" for note in (*notes, *found.notes)]
    if unused:
        said.append(
            f"{path.name}: {_first('left out, of parts that this model is built without', unused, len(unused))}"
        )
    return Loaded(unused, tuple(said))


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


def _state_dict(data: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in `data`, and a note if it had to be looked for."""
    notes: tuple[str, ...] = ()
    if isinstance(data, Mapping):
        key = _entry_of(data, path)
        if key is not None:
            data = data[key]
            notes = () if key in _WRAPPERS else (f"the weights were read from its entry {key!r}",)
    if not isinstance(data, Mapping) or not data:
        kind = "nothing" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise ValueError(f"{path} holds {kind}, not a state dict: save model.state_dict()")
    for key, value in data.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: the entry {key!r} is a {type(value).__name__}, not a tensor: save "
                f"model.state_dict() alone, or under one of the keys {', '.join(_WRAPPERS)}"
            )
        _refuse_strange(str(key), value, path)
    return {str(key): value for key, value in data.items()}, notes


def _entry_of(data: Mapping[Any, Any], path: Path) -> str | None:
    """The entry of a checkpoint in which the state dict lies; None if `data` is it."""
    known = next((key for key in _WRAPPERS if isinstance(data.get(key), Mapping)), None)
    if known is not None or any(isinstance(value, Tensor) for value in data.values()):
        return known
    found = [
        str(key)
        for key, value in data.items()
        if isinstance(value, Mapping) and value and all(isinstance(x, Tensor) for x in value.values())
    ]
    # states of random generators are tensors too, under names that no module gives
    found = [key for key in found if any("." in str(name) for name in data[key])] or found
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {len(found)} state dicts ({', '.join(map(repr, found))}): save the one that is meant alone, "
            f"or under one of the keys {', '.join(_WRAPPERS)}"
        )
    return found[0] if found else None


def _refuse_strange(key: str, value: Tensor, path: Path) -> None:
    """Refuses tensors whose numbers cannot simply be copied."""
    if value.is_quantized:
        what, remedy = f"quantized ({_dtype(value)})", _DEQUANTIZE
    elif value.is_meta:
        what = "without data (device meta)"
        remedy = "it was saved before its weights were loaded; save it again after that"
    elif value.is_nested or value.layout != torch.strided:
        what, remedy = f"no dense tensor ({str(value.layout).removeprefix('torch.')})", "save `.to_dense()` of it"
    elif value.is_complex():
        what = f"complex ({_dtype(value)})"
        remedy = (
            "ONNX computes with real numbers alone; keep real and imaginary part as two real parameters of the model"
        )
    else:
        return
    raise ValueError(f"{path}: weight {key!r} is {what}: {remedy}")


def _refuse_other_kind(key: str, value: Tensor, own: Tensor | None, path: Path) -> None:
    """Refuses whole numbers where the model has others, as packed weights are."""
    if own is not None and own.is_floating_point() and not value.is_floating_point():
        raise ValueError(
            f"{path}: weight {key!r} is {_dtype(value)} in the file and {_dtype(own)} in the model, as quantized "
            f"weights are: {_DEQUANTIZE}"
        )


def _part_of(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What to do where the model's weights are there, beside others."""
    for prefix in dict.fromkeys(key.split(".")[0] + "." for key in state if "." in key):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not _misfits(inside, own):
            beside = [key for key in state if not key.startswith(prefix)]
            return (
                f"Under {prefix!r} the file has all that the model needs, and beside it "
                f"{_first('other weights', map(repr, beside), len(beside))}: save that part alone. "
            )
    return ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _switched_off(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of submodules that a class knows and this instance lacks: plain attributes set to None."""
    return tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if value is None and not name.startswith("_")
    )


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape; empty if `state` can be loaded."""
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
    return [part for part in parts if part]


def _first(what: str, entries: Iterable[str], count: int) -> str:
    shown = [entry for entry, _ in zip(entries, range(_SHOWN), strict=False)]
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{what}: {', '.join(shown)}{more}" if shown else ""
