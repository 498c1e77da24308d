"""Tables of numbers in CSV files: each cell is looked at, and a bad one refused by its line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError


def read_columns(file: Path, columns: Sequence[str]) -> NDArray[np.float64]:
    """The numbers of `columns` of a CSV file with a header, float64 [rows, columns].

    Args:
        file: in UTF-8; its first line names the columns.
        columns: those to read, in this order.

    Raises:
        DataError: the file cannot be read or has no rows; a column is not there, or there twice; a row has another
            number of cells than the header; a cell is empty, no number, NaN or infinite. Names file, line and column.
    """
    numbers: list[list[float]] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, strict=True)
            header = next(rows, [])
            places = [_place(file, header, column) for column in columns]
            for row in rows:
                if not row:
                    continue  # a blank line, often the last
                if len(row) != len(header):
                    raise DataError(
                        f"{file}, line {rows.line_num}: {len(row)} cells where the header has {len(header)}: "
                        "mend the line"
                    )
                numbers.append(
                    [
                        _number(file, rows.line_num, name, row[place])
                        for name, place in zip(columns, places, strict=True)
                    ]
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error
    if not numbers:
        raise DataError(f"{file} has no rows beneath its header")
    return np.asarray(numbers, np.float64)


def refuse_constant(file: Path, columns: Sequence[str], numbers: NDArray[np.float64]) -> None:
    """Refuses a column that never changes: it tells nothing, and has no deviation to be divided by.

    Args:
        file: for the message.
        columns: names of the columns.
        numbers: [rows, columns].

    Raises:
        DataError: names the column and its value.
    """
    for name, column in zip(columns, numbers.T, strict=True):
        if (column == column[0]).all():
            raise DataError(f"{file}: column {name!r} is {column[0]:g} in all {len(column)} rows: leave it out")


def _place(file: Path, header: Sequence[str], column: str) -> int:
    found = [place for place, name in enumerate(header) if name.strip() == column]
    if len(found) != 1:
        times = "no column" if not found else f"{len(found)} columns called"
        raise DataError(f"{file}, line 1: {times} {column!r}; there are {', '.join(map(repr, header)) or 'none'}")
    return found[0]


def _number(file: Path, line: int, column: str, cell: str) -> float:
    where = f"{file}, line {line}, column {column!r}"
    if not cell.strip():
        raise DataError(f"{where}: the cell is empty: fill it or remove the line")
    try:
        number = float(cell)
    except ValueError:
        raise DataError(f"{where}: {cell.strip()!r} is no number: mend it or remove the line") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {cell.strip()} is not finite: mend it or remove the line")
    return number
