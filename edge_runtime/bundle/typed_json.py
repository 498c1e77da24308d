"""JSON read into the annotated types of frozen dataclasses, with distrust: nothing is guessed, nothing is left out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import BundleError

DAMAGED = "; the bundle is damaged: export it again"
"""How messages about damage end."""
_MOST_DIGITS = 20
"""Of an integer, with its sign: what 64 bits hold."""


def strict_json(text: str) -> Any:
    """Parses JSON without the liberties of Python's parser: no NaN, no number beyond float64 or 64 bits, no key twice.

    Raises:
        ValueError: not such JSON.
        RecursionError: nested too deeply.
    """
    return json.loads(
        text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_without_doubles
    )


def typed(kind: Any, value: Any, where: str) -> Any:
    """Turns JSON data into the annotated type.

    Args:
        kind: a frozen dataclass, or an annotation of one of its fields.
        value: parsed JSON.
        where: what the data is, for the messages.

    Raises:
        BundleError: a field that is missing, unknown or of a wrong type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _typed_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _typed_dataclass(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _misfit(where, "a list", value)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise _misfit(where, f"{len(arguments)} items", value)
        return tuple(typed(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(arguments, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _misfit(where, "an object", value)
        return {key: typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is type(None):
        kind = types.NoneType
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _misfit(where, kind.__name__, value)
    return value


def _typed_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return typed(kind, value, where)
        except BundleError:
            continue
    raise _misfit(where, " or ".join(getattr(k, "__name__", str(k)) for k in kinds), value)


def _typed_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise BundleError(f"{where} has the unknown field {key!r}{hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise BundleError(f"{where} lacks the field {name!r}{DAMAGED}")
    return kind(**{key: typed(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _misfit(where: str, wanted: str, value: Any) -> BundleError:
    return BundleError(f"{where} should be {wanted} and is {value!r:.80}{DAMAGED}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is JSON, and would make any tolerance meaningless
        raise ValueError(f"{text} is no finite number")
    return value


def _whole(text: str) -> int:
    # Python itself reads any length up to some limit of its own, and neither float64 nor int64 takes the result
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):  # readers differ in which one they take
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} stands twice")
    return data
