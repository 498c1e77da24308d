"""The inputs of a measurement: real ones, cut into runs, never zeros."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle
from ..bundle.golden import read_npz
from ..bundle.manifest import GoldenCase, Preprocessing, TensorSpec
from ..errors import InputError
from ..inference.feeds import check_feeds, prepare, unusable_rows

Feed = dict[str, NDArray[Any]]

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"

MOST_FEEDS = 512
"""Runs with different inputs before the cycle starts again."""


def read_inputs(path: str | os.PathLike[str]) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """Reads a user's .npy or .npz, without pickle; told apart by their first bytes, whatever they are called.

    Raises:
        InputError: no such file, another format, or an array of Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no input at {path}")
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_NPY))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if head.startswith(_ZIP):
        return read_npz(path)
    if head != _NPY:
        what = "is empty" if not head else "is neither a .npy nor a .npz file"
        raise InputError(
            f"{path} {what}: save the input with numpy.save (one array) or numpy.savez (an array per input); "
            "an image needs its usual ending, such as .png or .jpg"
        )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(f"{path} holds pickled Python objects, which are never read: save numbers") from None
        raise InputError(f"{path} is not a complete .npy file: {error}") from None
    return np.asarray(array)


def golden_feeds(bundle: Bundle, rows: int = 1) -> list[Feed]:
    """The inputs of the golden cases that ran with the thresholds stored in the graph, cut into runs.

    Cases with other thresholds were made to force an exit, and say nothing about the natural mix.

    Raises:
        InputError: there is no such case.
    """
    points = bundle.manifest.operating_points
    stored = np.asarray(points[0].thresholds, np.float32) if points else None
    feeds: list[Feed] = []
    for case in bundle.golden():
        if _is_natural(case, stored):
            feeds += cut(dict(case.inputs), rows)
    if not feeds:
        raise InputError(f"{bundle.source} records no run with its own thresholds: give inputs of your own")
    return not_zero(feeds)[:MOST_FEEDS]


def user_feeds(
    given: NDArray[Any] | Mapping[str, NDArray[Any]],
    specs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None,
    rows: int = 1,
) -> list[Feed]:
    """A user's arrays, preprocessed like in `predict`, checked and cut into runs of `rows` rows.

    Raises:
        InputError: the arrays do not fit the model, hold NaN or infinity, or are zeros.
    """
    arrays = prepare(given, specs, preprocessing)
    for reason in unusable_rows(arrays).values():
        raise InputError(f"{reason}: nothing real looks like that, measure with inputs that have an answer")
    feeds = cut(arrays, rows)[:MOST_FEEDS]
    check_feeds(specs, feeds[0])
    return not_zero(feeds)


def cut(arrays: Mapping[str, NDArray[Any]], rows: int) -> list[Feed]:
    """Cuts arrays along axis 0 into pieces of `rows` rows; an incomplete last piece is left out.

    Raises:
        InputError: different numbers of rows, or fewer than `rows`.
    """
    if rows < 1:
        raise InputError(f"rows per run is a positive number, not {rows}")
    counts = {value.shape[0] if value.ndim else 0 for value in arrays.values()}
    if len(counts) != 1 or max(counts) < rows:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
        raise InputError(f"the inputs need the same number of rows in axis 0, at least {rows}: got {shapes}")
    starts = range(0, counts.pop() - rows + 1, rows)
    return [{name: value[start : start + rows] for name, value in arrays.items()} for start in starts]


def not_zero(feeds: list[Feed]) -> list[Feed]:
    """Returns `feeds` unless all of them are zeros, which would measure the one path that zeros take.

    Raises:
        InputError: every value is zero.
    """
    if not any(np.any(value) for feed in feeds for value in feed.values()):
        raise InputError("every input is zero: measure with real inputs, latency and exits depend on them")
    return feeds


def _is_natural(case: GoldenCase, stored: NDArray[np.float32] | None) -> bool:
    if case.thresholds is None:
        return True
    return stored is not None and np.array_equal(np.asarray(case.thresholds, np.float32), stored)
