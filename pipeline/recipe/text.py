"""From the text of a recipe to plain data: YAML or JSON, shorthands, and `--set` overrides."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

_SIZE_LIMIT_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a repeated key is an error, 1e-3 is a number, and dates stay text."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands here twice", problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The data in `text`, which may be YAML or JSON.

    Raises:
        RecipeError: not YAML; names `source` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise RecipeError(f"{where}: {error.problem or error.context or 'not YAML'}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source} is not YAML: {error}") from None


def _parse_json(text: str, source: str) -> Any:
    """JSON is not quite YAML: it may be indented with tabs."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RecipeError(f"{source}: the key {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source} is not JSON: {error}") from None


def read_recipe_data(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RecipeError: the file cannot be read, is not text, or does not hold a mapping.
    """
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a folder; give the recipe file in it")
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes, too many for a recipe: is it the right file?")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; give the path of a YAML or JSON file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text: is it the right file?") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    data = _parse_json(text, str(path)) if path.suffix.lower() == ".json" else parse_yaml(text, str(path))
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {_kind(data)}"
        raise RecipeError(f"{path} {what}; a recipe is a mapping that has at least `model` and `task`")
    return data


def expand_shorthands(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of `data` in which ``model: NAME``, ``task: NAME`` and stages given by their name are
    mappings."""
    whole = copy.deepcopy(data)
    for key in ("model", "task"):
        if isinstance(whole.get(key), str):
            whole[key] = {"name": whole[key]}
    stages = whole.get("stages")
    if isinstance(stages, list):
        whole["stages"] = [{"name": entry} if isinstance(entry, str) else entry for entry in stages]
    return whole


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with ``a.b.0.c=value`` applied in order; values are YAML.

    Keys that the recipe leaves to their default may be set; whether they exist is judged with the whole
    recipe.

    Raises:
        RecipeError: no ``=``, a list position that does not exist, or a path through something that is no
            mapping.
    """
    whole = expand_shorthands(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"--set {override}: write it as PATH=VALUE, for example stages.0.epochs=5")
        _set(whole, parts, parse_yaml(text, f"--set {override}"), override)
        whole = expand_shorthands(whole)
    return whole


def _set(whole: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    here: Any = whole
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: Any = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                there = ".".join(parts[:depth])
                known = f"has the positions 0 to {len(here) - 1}" if here else "is empty"
                raise RecipeError(f"--set {override}: {there!r} {known}, not {part!r}")
            key = int(part)
        elif not isinstance(here, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[:depth])!r} is {_kind(here)}, nothing lies below it")
        if last:
            here[key] = value
            return
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return {"dict": "a mapping", "list": "a list", "str": "text"}.get(type(value).__name__, repr(value))
