"""What `predict` found, as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..process.plain_text import printable
from .prediction import ClassMap, Prediction, Result, Tokens, Values

_SHOWN_VALUES = 8
_SHOWN_CLASSES = 5


def result_lines(results: Mapping[str, Result]) -> list[str]:
    """One line for each row of each answer; several answers are told apart by their names.

    Args:
        results: by name of the answer, all of the same rows.
    """
    named = len(results) > 1
    rows = len(next(iter(results.values()))[0])
    return [
        f"row {row}: {f'{printable(name)} ' if named else ''}{_row_text(result, row)}"
        for row in range(rows)
        for name, result in results.items()
    ]


def result_dict(results: Mapping[str, Result]) -> dict[str, Any]:
    """Plain data for a JSON file: of several answers one object for each, under ``answers``."""
    if len(results) == 1:
        return {"schema_version": 1, **_data(next(iter(results.values())))}
    return {"schema_version": 1, "answers": {name: _data(result) for name, result in results.items()}}


def _row_text(result: Result, row: int) -> str:
    if row in result.refused:
        return f"refused: {result.refused[row]}"
    if isinstance(result, Values):
        return _values_text(result.values[row], result)
    if isinstance(result, ClassMap):
        shares = result.shares(row)
        shown = ", ".join(f"{printable(name)} {share:.1%}" for name, share in list(shares.items())[:_SHOWN_CLASSES])
        more = f", {len(shares) - _SHOWN_CLASSES} more" if len(shares) > _SHOWN_CLASSES else ""
        return f"{shown}{more}  of {' x '.join(map(str, result.label[row].shape))} pixels"
    if isinstance(result, Tokens):
        shown = " ".join(map(str, result.token[row].ravel()[-_SHOWN_VALUES:].tolist()))
        return f"tokens {'... ' if result.token[row].size > _SHOWN_VALUES else ''}{shown}"
    return _class_text(result, row)


def _class_text(prediction: Prediction, row: int) -> str:
    if prediction.label.ndim != 1:
        return f"labels {prediction.label[row].tolist()}"
    kind = prediction.score_kinds[row]
    index, scores = int(prediction.exit_index[row]), prediction.scores[row]
    name = printable(prediction.label_names[row])
    exit_name = f" ({printable(prediction.exits[index])})" if len(prediction.exits) > 1 else ""
    if kind == "exclusion":
        return f"{name}  decided by exclusion of every other class, no probability  exit {index}{exit_name}"
    remaining = f" among the {int((scores > 0).sum())} classes not excluded" if kind != "probability" else ""
    return f"{name}  score {float(scores[prediction.label[row]]):.4f}{remaining}  exit {index}{exit_name}"


def _values_text(values: NDArray[Any], result: Values) -> str:
    """The first numbers, with the names of the columns where there are any."""
    numbers = np.asarray(values).ravel()
    names = result.labels if len(result.labels) == numbers.size else ("",) * numbers.size
    pairs = zip(names, numbers[:_SHOWN_VALUES].tolist(), strict=False)
    shown = " ".join(f"{printable(name)} {number:.6g}" if name else f"{number:.6g}" for name, number in pairs)
    unit = f" {printable(result.unit)}" if result.unit else ""
    more = f" ... {list(np.shape(values))}" if numbers.size > _SHOWN_VALUES else ""
    return f"{shown}{unit}{more}"


def _data(result: Result) -> dict[str, Any]:
    refused = {str(row): reason for row, reason in result.refused.items()}
    if isinstance(result, Values):
        labels = list(result.labels)
        return {"values": _json_numbers(result.values), "unit": result.unit, "labels": labels, "refused": refused}
    if isinstance(result, ClassMap):
        shares = [{} if row in result.refused else result.shares(row) for row in range(len(result.label))]
        labels = list(result.labels)
        return {"label": result.label.tolist(), "labels": labels, "shares": shares, "refused": refused}
    if isinstance(result, Tokens):
        return {"token": result.token.tolist(), "refused": refused}
    exits = result.exits
    return {
        "label": result.label.tolist(),
        "label_names": result.label_names,
        "scores": _json_numbers(result.scores),
        "score_kinds": result.score_kinds,
        "exit_index": result.exit_index.tolist(),
        "exit_names": [exits[i] if 0 <= i < len(exits) else None for i in result.exit_index.ravel().tolist()],
        "refused": refused,
    }


def _json_numbers(values: NDArray[Any]) -> Any:
    numbers = values.astype(object)
    if values.dtype.kind in "fc":
        numbers[~np.isfinite(values)] = None  # JSON has no NaN
    return numbers.tolist()
