"""CSV files of numbers: what is read, and what is refused by file, line and column."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.table_file import load_table, read_columns


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
        ("a,b\n1,1_000\n", r"line 2, column 'b': '1_000' is no number"),
        ("a,b\n1,\u0664\n", r"column 'b': '\u0664' is no number"),
        ("a,b\n1,1e39\n", r"column 'b': 1e39 is beyond what float32 holds"),
        ('a,b\n1,"2\n', r"cannot be read as a CSV file"),
    ],
)
def test_a_bad_table_is_refused_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_columns(_written(tmp_path, text), ["a", "b"])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        read_columns(tmp_path / "none.csv", ["a"])


TABLE = Preprocessing(kind="table", columns=("b", "a"), mean=(1.0, 2.0), std=(2.0, 4.0))


def test_rows_are_standardised_as_in_training(tmp_path: Path) -> None:
    file = _written(tmp_path, "a,b\n2,1\n6,5\n-2,1\n")
    found = load_table(file, TABLE)
    np.testing.assert_array_equal(found, np.array([[0, 0], [2, 1], [0, -1]], np.float32))
    assert found.dtype == np.float32
    last = load_table(file, dataclasses.replace(TABLE, window=2))
    np.testing.assert_array_equal(last, np.array([[[2, 0], [1, -1]]], np.float32))


def test_too_few_rows_and_a_bundle_that_reads_no_tables_are_refused(tmp_path: Path) -> None:
    file = _written(tmp_path, "a,b\n2,1\n")
    with pytest.raises(InputError, match="has 1 rows, and the model reads the last 4"):
        load_table(file, dataclasses.replace(TABLE, window=4))
    with pytest.raises(InputError, match="does not say how tables become its input"):
        load_table(file, Preprocessing())
