"""CSV files of numbers: what is read, and what is refused by file, line and column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.number_tables import read_columns, refuse_constant


def _written(folder: Path, text: str) -> Path:
    file = folder / "t.csv"
    file.write_bytes(text.encode())
    return file


def test_columns_are_read_by_name_in_the_order_asked_for(tmp_path: Path) -> None:
    file = _written(tmp_path, '\ufeffa, b,note\r\n1,2e-3,"x, y"\r\n\r\n-3,4,"two\nlines"\r\n')
    np.testing.assert_array_equal(read_columns(file, ["b", "a"]), [[0.002, 1.0], [4.0, -3.0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,\n", r"t\.csv, line 3, column 'b': the cell is empty"),
        ("a,b\n1,2\n3,four\n", r"line 3, column 'b': 'four' is no number"),
        ("a,b\nnan,2\n", r"line 2, column 'a': nan is not finite"),
        ("a,b\n1,-inf\n", r"line 2, column 'b': -inf is not finite"),
        ("a,b\n1,2,3\n", r"line 2: 3 cells where the header has 2"),
        ("a,c\n1,2\n", r"line 1: no column 'b'; there are 'a', 'c'"),
        ("a,b,b\n1,2,3\n", r"line 1: 2 columns called 'b'"),
        ("a,b\n", r"no rows beneath its header"),
        ("", r"line 1: no column 'a'; there are none"),
        ('a,b\n1,"2\n', r"cannot be read as a CSV file"),
    ],
)
def test_a_bad_table_is_refused_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_columns(_written(tmp_path, text), ["a", "b"])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        read_columns(tmp_path / "none.csv", ["a"])


def test_a_constant_column_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    refuse_constant(file, ["a", "b"], np.array([[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(DataError, match=r"column 'b' is 2 in all 2 rows"):
        refuse_constant(file, ["a", "b"], np.array([[1.0, 2.0], [3.0, 2.0]]))
