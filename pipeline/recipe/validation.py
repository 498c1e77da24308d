"""Turns pydantic's errors into sentences with the full path of the key and, for unknown keys, the nearest
one."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

_Location = tuple[int | str, ...]


class SectionError(ValueError):
    """Raised by a validator that hands a part of its input to another model class; keeps that class's
    errors."""

    def __init__(self, error: ValidationError, model: type[BaseModel], beside: tuple[str, ...] = ()) -> None:
        """Wraps `error`.

        Args:
            error: what `model` raised.
            model: the class that judged the part.
            beside: keys that are legal there without being fields of `model`.
        """
        super().__init__(str(error))
        self.error = error
        self.model = model
        self.beside = beside


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence per problem.

    Args:
        error: what validating data against `model` raised.
        model: the class that was validated.
    """
    return list(dict.fromkeys(_sentences(error, model, (), ())))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def _sentences(
    error: ValidationError, model: type[BaseModel], prefix: _Location, beside: tuple[str, ...]
) -> Iterator[str]:
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in prefix + item["loc"])
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, SectionError):
            yield from _sentences(inner.error, inner.model, prefix + item["loc"], inner.beside)
        elif item["type"] == "extra_forbidden":
            yield _unknown_key(path, item["loc"], model, beside)
        elif item["type"] == "missing":
            yield f"{path!r} is missing"
        elif item["msg"].startswith("Input should "):
            wanted = item["msg"].removeprefix("Input should ")
            yield f"{path!r} is {_shown(item['input'])} and should {wanted}"
        else:
            yield f"{path!r}: " + item["msg"].removeprefix("Value error, ")


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"{value!r:.60}"


def _unknown_key(path: str, location: _Location, model: type[BaseModel], beside: tuple[str, ...]) -> str:
    owner = _model_at(model, location[:-1])
    valid = list(owner.model_fields) if owner is not None else []
    if len(location) == 1:
        valid += beside
    close = nearest(str(location[-1]), valid)
    if close is not None:
        return f"unknown key {path!r}; did you mean {'.'.join([*path.split('.')[:-1], close])!r}?"
    return f"unknown key {path!r}" + (f"; here may stand: {', '.join(valid)}" if valid else "; nothing may stand here")


def _model_at(model: type[BaseModel], location: _Location) -> type[BaseModel] | None:
    """The model class that holds the key at the end of `location`, following fields through lists and
    unions."""
    candidates = [model]
    for part in location:
        named = [c for c in candidates if c.__name__ == part]
        if isinstance(part, int) or named:
            candidates = named or candidates
            continue
        fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
        if not fields:
            continue
        candidates = [inner for field in fields for inner in _models_in(field.annotation)]
    return candidates[0] if candidates else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _models_in(argument)]
