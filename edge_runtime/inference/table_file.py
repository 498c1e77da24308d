"""Tables of numbers in CSV files, read by column; a bad cell is refused by its line. Tasks and `predict` read alike."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Preprocessing
from ..errors import InputError

SUFFIXES = frozenset((".csv",))
"""Endings of files that `load_table` reads."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)


def load_table(path: str | os.PathLike[str], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Reads a CSV file as the model's input, standardised as in training.

    Args:
        path: in UTF-8; its first line names the columns, of which the manifest's are read, in any order.
        preprocessing: the manifest's, of kind ``"table"``.

    Returns:
        Float32 [rows, columns]; where the model reads a window of a series, the last one, [1, columns, window].

    Raises:
        InputError: another kind of preprocessing, a file that cannot be read, fewer rows than a window, or what
            `read_columns` refuses.
    """
    if preprocessing.kind != "table":
        raise InputError(f"{path} is a table, and the bundle does not say how tables become its input: give a .npy")
    rows = read_columns(Path(path), preprocessing.columns)
    if preprocessing.window is None:
        return standardised(rows, preprocessing)
    if len(rows) < preprocessing.window:
        raise InputError(f"{path} has {len(rows)} rows, and the model reads the last {preprocessing.window}: give more")
    return np.ascontiguousarray(standardised(rows[-preprocessing.window :], preprocessing).T[None])


def standardised(rows: NDArray[np.float64], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """What the model reads of `rows` [N, columns]: less the mean, over the deviation, where there are any."""
    values = rows
    if preprocessing.mean:
        values = values - np.asarray(preprocessing.mean, np.float64)
    if preprocessing.std:
        values = values / np.asarray(preprocessing.std, np.float64)
    return values.astype(np.float32)


def header_of(file: Path) -> list[str]:
    """Names of the columns of a CSV file, without spaces around them.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [name.strip() for name in next(csv.reader(stream, strict=True), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error


def read_columns(file: Path, columns: Sequence[str]) -> NDArray[np.float64]:
    """The numbers of `columns` of a CSV file with a header, float64 [rows, columns]; float32 has room for each.

    Args:
        file: in UTF-8; its first line names the columns.
        columns: those to read, in this order.

    Raises:
        InputError: the file cannot be read or has no rows; a column is not there, or there twice; a row has another
            number of cells than the header; a cell is empty, no number, NaN or infinite in float32. Names file, line
            and column.
    """
    numbers: list[list[float]] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(rows, [])]
            places = [_place(file, header, column) for column in columns]
            for row in rows:
                if not row:
                    continue  # a blank line, often the last
                if len(row) != len(header):
                    raise InputError(
                        f"{file}, line {rows.line_num}: {len(row)} cells where the header has {len(header)}: "
                        "mend the line"
                    )
                cells = zip(columns, places, strict=True)
                numbers.append([_number(file, rows.line_num, name, row[place]) for name, place in cells])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error
    if not numbers:
        raise InputError(f"{file} has no rows beneath its header")
    return np.asarray(numbers, np.float64)


def _place(file: Path, header: Sequence[str], column: str) -> int:
    found = [place for place, name in enumerate(header) if name == column]
    if len(found) != 1:
        times = "no column" if not found else f"{len(found)} columns called"
        raise InputError(f"{file}, line 1: {times} {column!r}; there are {', '.join(map(repr, header)) or 'none'}")
    return found[0]


def _number(file: Path, line: int, column: str, cell: str) -> float:
    where = f"{file}, line {line}, column {column!r}"
    text = cell.strip()
    if not text:
        raise InputError(f"{where}: the cell is empty: fill it or remove the line")
    if _NOT_FINITE.fullmatch(text):
        raise InputError(f"{where}: {text} is not finite: mend it or remove the line")
    # float() alone takes "1_000" and digits of any script
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{where}: {text!r} is no number: mend it or remove the line")
    number = float(text)
    if abs(number) > float(np.finfo(np.float32).max):
        raise InputError(f"{where}: {text} is beyond what float32 holds: scale the column")
    return number
