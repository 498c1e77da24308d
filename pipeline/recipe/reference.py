"""The reference of every recipe option, `docs/recipe.md`, made from the JSON schema; kept current by a test.

``python -m edgewright.pipeline.recipe.reference`` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .schema import json_schema

REFERENCE_FILE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"

_HEAD = """# Every option of a recipe

Made from the recipes' schema by `python -m edgewright.pipeline.recipe.reference`: change the docstrings, not this file.
A recipe is YAML or JSON. A field without a default is required. `edgewright schema` writes the same for editors.
"""

_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minItems": "{} items at least",
    "pattern": "matches `{}`",
}


def reference_text() -> str:
    """The content of `REFERENCE_FILE`."""
    schema = json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    listed = schema["properties"]["stages"]["items"]["anyOf"]
    stages = [str(item["$ref"]).removeprefix("#/$defs/") for item in listed if "$ref" in item]
    sections = sorted(definitions.keys() - set(stages))
    whole = {**schema, "description": "The whole file."}
    parts = [_HEAD, _section("Recipe", whole, definitions)]
    parts += [_section(name, definitions[name], definitions) for name in stages]
    parts += [_section(name, definitions[name], definitions) for name in sections]
    return "\n".join(parts)


def _section(name: str, definition: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    lines = [f"## {_heading(name)}", "", _one_line(definition.get("description", "")), ""]
    required = definition.get("required", ())
    lines += ["| field | type | default | |", "|---|---|---|---|"]
    for key, field in definition.get("properties", {}).items():
        default = _default(field, key in required)
        text = _one_line(field.get("description") or _described(field, definitions))
        lines.append("| " + " | ".join(_cell(cell) for cell in (f"`{key}`", _type(field), default, text)) + " |")
    return "\n".join(lines) + "\n"


def _heading(name: str) -> str:
    """`stage train` as it stands in a recipe, sections by their name."""
    return f"Stage `{name.removeprefix('stage ')}`" if name.startswith("stage ") else name


def _type(field: Mapping[str, Any]) -> str:
    """What may stand there, with its limits."""
    found = list(dict.fromkeys(_alternatives(field)))
    return " or ".join([kind for kind in found if kind != "null"] + ["null"] * ("null" in found))


def _alternatives(field: Mapping[str, Any]) -> Iterator[str]:
    for key in ("anyOf", "oneOf", "allOf"):
        for option in field.get(key, ()):
            yield from _alternatives(option)
    if "$ref" in field:
        name = str(field["$ref"]).removeprefix("#/$defs/")
        yield f"[{_heading(name)}](#{_anchor(name)})"
    elif "enum" in field:
        yield ", ".join(f"`{_json(value)}`" for value in field["enum"])
    elif "const" in field:
        yield f"`{_json(field['const'])}`"
    elif field.get("type") == "array":
        yield _array(field)
    elif field.get("type") == "object":
        values = field.get("additionalProperties")
        yield "mapping of " + _type(values) if isinstance(values, dict) and values else "mapping"
    elif "type" in field:
        named = {"string": "text", "number": "number", "integer": "whole number", "boolean": "true or false"}
        kind = "path" if field.get("format") == "path" else named.get(str(field["type"]), str(field["type"]))
        yield kind + _limits(field)
    elif not {"anyOf", "oneOf", "allOf"} & field.keys():
        yield "anything"


def _array(field: Mapping[str, Any]) -> str:
    if "prefixItems" in field:
        return "list of " + ", ".join(_type(item) for item in field["prefixItems"])
    return "list of " + (_type(field["items"]) if field.get("items") else "anything") + _limits(field)


def _limits(field: Mapping[str, Any]) -> str:
    found = [text.format(field[key]) for key, text in _LIMITS.items() if key in field]
    return f" ({', '.join(found)})" if found else ""


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    if "default" in field:
        # one that is a whole section has its defaults there
        value = field["default"]
        return "its own" if isinstance(value, dict) and value and "$ref" in str(field) else f"`{_json(value)}`"
    if "const" in field:
        return ""
    return "empty" if field.get("type") == "object" or field.get("type") == "array" else "its own"


def _described(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The description of the section that a field without one of its own refers to."""
    for option in (field, *field.get("anyOf", ())):
        name = str(option.get("$ref", "")).removeprefix("#/$defs/")
        if name in definitions:
            return str(definitions[name].get("description", ""))
    return ""


def _anchor(name: str) -> str:
    return _heading(name).lower().replace("`", "").replace(" ", "-")


def _json(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    REFERENCE_FILE.write_text(reference_text(), encoding="utf-8")
