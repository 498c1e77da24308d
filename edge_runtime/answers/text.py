"""What `predict` found, as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..process.plain_text import printable
from .kind import Result


def result_lines(results: Mapping[str, Result]) -> list[str]:
    """One line for each row of each answer; several answers are told apart by their names.

    Args:
        results: by name of the answer, all of the same rows.
    """
    named = len(results) > 1
    return [
        f"row {row}: {f'{printable(name)} ' if named else ''}{_row(result, row)}"
        for row in range(next(iter(results.values())).rows)
        for name, result in results.items()
    ]


def result_dict(results: Mapping[str, Result]) -> dict[str, Any]:
    """Plain data for a JSON file: of several answers one object for each, under ``answers``."""
    if len(results) == 1:
        return {"schema_version": 1, **_data(next(iter(results.values())))}
    return {"schema_version": 1, "answers": {name: _data(result) for name, result in results.items()}}


def _row(result: Result, row: int) -> str:
    return f"refused: {result.refused[row]}" if row in result.refused else result.text(row)


def _data(result: Result) -> dict[str, Any]:
    return {**result.data(), "refused": {str(row): reason for row, reason in result.refused.items()}}
