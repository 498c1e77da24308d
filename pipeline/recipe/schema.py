"""The JSON schema of recipes, for editors; shipped as `recipes/recipe.schema.json`, kept current by a test.

``python -m edgewright.pipeline.recipe.schema`` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from ..stage import Stage
from ..stage_registry import SHIPPED, stage_named
from .recipe import Recipe, StageEntry

SCHEMA_FILE = Path(__file__).parents[1] / "recipes" / "recipe.schema.json"


def json_schema(stages: Sequence[Stage[Any]] | None = None) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, with the fields of `stages`, default those that ship."""
    stages = [stage_named(name) for name in SHIPPED] if stages is None else stages
    configs = {stage.name: stage.config for stage in stages}
    models = [(Recipe, "validation"), *((config, "validation") for config in configs.values())]
    places, whole = models_json_schema(models, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    definitions: dict[str, Any] = whole["$defs"]
    recipe = definitions.pop(_name(places[Recipe, "validation"]))
    entry = definitions.pop("StageEntry")
    definitions.pop("StageConfig", None)
    for name, config in configs.items():
        key = _name(places[config, "validation"])
        definitions[f"stage {name}"] = _inline(name, entry["properties"]["id"], definitions[key])
    entries = [{"$ref": f"#/$defs/stage {name}"} for name in configs]
    recipe["properties"]["stages"]["items"] = {"anyOf": [*entries, {"enum": list(configs)}]}
    require = definitions["Requirements"]
    require["additionalProperties"] = False
    for stage in stages:
        for field, requirement in stage.requirements.items():
            about = {"default": False, "description": requirement.about, "title": field, "type": "boolean"}
            require["properties"][field] = about
    for key in ("model", "task"):
        reference = recipe["properties"][key]
        recipe["properties"][key] = {"anyOf": [reference, {"type": "string"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "title": "edgewright recipe",
        "$defs": _reachable(definitions, recipe),
    }


def schema_text(stages: Sequence[Stage[Any]] | None = None) -> str:
    """The schema as JSON; without `stages` the content of `SCHEMA_FILE`."""
    return json.dumps(json_schema(stages), indent=2, sort_keys=True) + "\n"


def _inline(name: str, identity: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    described = {"const": name, "description": StageEntry.model_fields["name"].description}
    return {
        **config,
        "title": name,
        "properties": {"name": described, "id": identity, **config.get("properties", {})},
        "required": ["name", *config.get("required", [])],
    }


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).removeprefix("#/$defs/")


def _reachable(definitions: dict[str, Any], start: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    waiting = [start]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            reference = item.get("$ref")
            if isinstance(reference, str) and (key := _name(item)) not in kept:
                kept[key] = definitions[key]
                waiting.append(definitions[key])
            waiting += list(item.values())
        elif isinstance(item, list):
            waiting += item
    return kept


if __name__ == "__main__":
    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
