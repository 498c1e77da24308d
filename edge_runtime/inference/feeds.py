"""What a graph takes, and whether given arrays are that."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bundle.manifest import PAST, Preprocessing, TensorSpec
from ..errors import InputError
from .preprocess import preprocess_image

_MOST_KNOWN = 256
"""Signatures that a `FeedChecker` remembers."""

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
KNOWN_DTYPES = frozenset(_DTYPES.values())
"""numpy names of the dtypes that an input may have."""


def specs_of(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """The specs of a session's inputs or outputs."""
    return tuple(
        TensorSpec(
            node.name,
            _DTYPES.get(node.type, node.type),
            tuple(size if isinstance(size, int) else str(size or f"axis{i}") for i, size in enumerate(node.shape)),
        )
        for node in nodes
    )


class FeedChecker:
    """`check_feeds` for one session, quick for shapes and dtypes that have passed before.

    What fits is decided by names, dtypes and shapes alone, so it is remembered by them. Safe to use from several
    threads.
    """

    def __init__(self, specs: Sequence[TensorSpec], no_rows: bool = False) -> None:
        self._specs, self._no_rows = tuple(specs), no_rows
        self._names = tuple(spec.name for spec in self._specs)
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """As `check_feeds`."""
        try:
            arrays = {name: feeds[name] for name in self._names}
            # np.matrix and other subclasses, lists and numbers take the long way, which converts them
            key = tuple([(v.shape, v.dtype) if type(v) is np.ndarray else None for v in arrays.values()])
            if key in self._known and len(feeds) == len(arrays):
                return arrays
        except KeyError:
            key = (None,)
        arrays = check_feeds(self._specs, feeds, self._no_rows)
        if None not in key and len(self._known) < _MOST_KNOWN:
            self._known.add(key)
        return arrays


def check_feeds(
    specs: Sequence[TensorSpec], feeds: Mapping[str, NDArray[Any]], no_rows: bool = False
) -> dict[str, NDArray[Any]]:
    """Holds arrays against the specs of the inputs, without running anything.

    Args:
        specs: of the graph's inputs.
        feeds: an array for each.
        no_rows: whether a batch without rows is fine.

    Raises:
        InputError: a missing or unknown name, another dtype or shape, two sizes for one named axis, an empty
            array.
    """
    names = [spec.name for spec in specs]
    for name in feeds:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"unknown input {name!r}: {hint}the model takes {', '.join(names)}")
    axes: dict[str, tuple[int, str]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if spec.name not in feeds:
            raise InputError(f"input {spec.name!r} is missing: wanted {spec.dtype} {_shape_text(spec.shape)}")
        value = as_array(spec.name, feeds[spec.name])
        _check_one(spec, value, axes, no_rows)
        arrays[spec.name] = value
    return arrays


def as_array(name: str, value: Any) -> NDArray[Any]:
    """What a person gave for the input `name`, as an array of numbers.

    Raises:
        InputError: lists whose rows differ in length, or what is made of no numbers.
    """
    if type(value) is np.ndarray and value.dtype != object:
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # what lists and foreign tensors raise
        if isinstance(value, list | tuple):
            raise InputError(
                f"input {name!r} is no array: its nested lists differ in length or depth, or hold what is no number "
                f"({error})"
            ) from None
        raise InputError(f"input {name!r} is no array: {error}") from None
    if array.dtype.kind not in "biufc":
        what = "Python objects" if array.dtype == object else str(array.dtype)
        hint = ", or lists that differ in length" if array.dtype == object else ""
        raise InputError(f"input {name!r} is no array of numbers: got {what} {list(array.shape)}{hint}")
    return array


def is_finite(value: NDArray[Any]) -> bool:
    """Whether an array of any dtype holds neither NaN nor infinity."""
    if value.dtype.kind not in "fc":
        return True
    # for small arrays `all` takes longer than all the rest
    return b"\0" not in np.isfinite(value).tobytes()


def unusable_rows(feeds: Mapping[str, NDArray[Any]]) -> dict[int, str]:
    """The rows that hold NaN or infinity: row -> which input holds what, and where.

    Raises:
        InputError: such a value in an input that has no rows, or rows of its own number.
    """
    rows: dict[int, str] = {}
    counts = {value.shape[0] if value.ndim else None for value in feeds.values()}
    for name, value in feeds.items():
        if is_finite(value):
            continue
        if len(counts) != 1 or None in counts:
            raise InputError(f"input {name!r} holds NaN or infinity, and no row of it can be left out: clean it")
        bad = ~np.isfinite(value)
        for row in np.flatnonzero(bad.reshape(len(value), -1).any(axis=1)).tolist():
            first = tuple(np.argwhere(bad[row])[0].tolist())
            more = int(bad[row].sum()) - 1
            text = f"input {name!r}, row {row}: {value[(row, *first)]} at {list(first)}"
            rows.setdefault(row, text + (f" and {more} more" if more else ""))
    return rows


def prepare(
    x: ArrayLike | Mapping[str, ArrayLike],
    specs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None = None,
) -> dict[str, NDArray[Any]]:
    """Turns what a person has into what a graph takes, without checking it; `check_feeds` does that.

    Args:
        x: one array for a graph with one input, or a mapping of input names to arrays. Images, which are integers, are
            preprocessed; other arrays get a batch axis if they lack one.
        specs: of the graph's inputs.
        preprocessing: the manifest's; None: arrays are taken as they are.

    Raises:
        InputError: one array for a graph with several inputs, what is no array, or an image that does not fit.
    """
    if isinstance(x, Mapping):
        given = {name: as_array(name, value) for name, value in x.items()}
    elif len(specs) == 1:
        given = {specs[0].name: as_array(specs[0].name, x)}
    else:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(f"the model has {len(specs)} inputs: give a mapping (.npz) with {names}")
    is_image = preprocessing is not None and preprocessing.kind == "image"
    for spec in specs:
        value = given.get(spec.name)
        if value is None:  # `check_feeds` names it
            continue
        if preprocessing is not None and is_image and _is_raw_image(value, spec):
            given[spec.name] = preprocess_image(value, preprocessing)
        elif value.ndim == len(spec.shape) - 1:
            given[spec.name] = value[None]
    return given


def _is_raw_image(value: NDArray[Any], spec: TensorSpec) -> bool:
    """Whole numbers for an input of floats are pixels; whether their dtype fits, `preprocess_image` says."""
    return value.dtype.kind in "biu" and np.dtype(spec.dtype).kind == "f"


def _check_one(spec: TensorSpec, value: NDArray[Any], axes: dict[str, tuple[int, str]], no_rows: bool) -> None:
    wanted = f"wanted {spec.dtype} {_shape_text(spec.shape)}"
    got = f"got {value.dtype} {list(value.shape)}"
    fits = len(value.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if value.dtype != np.dtype(spec.dtype):
        hint = f": convert it with .astype({spec.dtype!r})" if fits else ""
        raise InputError(f"input {spec.name!r}: {wanted}, {got}{hint}")
    if not fits:
        single = spec.shape[:1] == (1,) and value.shape[1:] == tuple(spec.shape[1:])
        hint = ": the model takes one row a run, use predict() or run_rows()" if single else ""
        raise InputError(f"input {spec.name!r}: {wanted}, {got}{hint}")
    # a cache begins without tokens
    cache = spec.name.startswith(PAST) and value.shape[0] > 0
    if value.size == 0 and not cache and not (no_rows and value.shape[0] == 0 and all(value.shape[1:])):
        raise InputError(f"input {spec.name!r} is empty: {wanted}, {got}")
    for want, have in zip(spec.shape, value.shape, strict=True):
        if isinstance(want, str):
            size, owner = axes.setdefault(want, (have, spec.name))
            if size != have:
                raise InputError(f"input {spec.name!r}: axis {want!r} has {have} and is {size} in input {owner!r}")


def _shape_text(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
