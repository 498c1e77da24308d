"""Numbers from a table: rows of a CSV file or of arrays, or what comes next in a time series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.table_file import header_of, read_columns, standardised

from ...errors import DataError
from ...sources import content_digest
from ...task import SPLITS, SplitName
from ..array_task import ArraySplit
from ..regression import Regression
from ..splitting import stratified_split
from ..time_windows import stretches_in_time, windows

_LEAST_ROWS = 20
_STRIDES: Mapping[SplitName, int] = {"train": 1, "calibration": 1}


def regression(
    csv_path: str | Path | None = None,
    path: str | Path | None = None,
    *,
    targets: Sequence[str] = (),
    inputs: Sequence[str] | None = None,
    window: int | None = None,
    horizon: int | None = None,
    stride: int | None = None,
    unit: str = "",
    standardise: bool = True,
    standardise_inputs: bool = True,
    metric: str = "mse",
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
) -> Regression:
    """Rows of numbers and the numbers that belong to them; the bundle's `predict` takes a CSV file of the same columns.

    * `csv_path`: the model reads the `inputs` of a row, [N, columns], and predicts its `targets`, [N, targets].
    * `csv_path` and `window`: the lines are a series in order of time. The model reads the `inputs` of `window` rows,
      [N, columns, window], and predicts the `targets` of the `horizon` rows after them: [N, horizon] of one target,
      [N, targets, horizon] of several. Splits follow each other in time and share no row.
    * `path`: arrays ``inputs`` and ``targets`` of a .npz, first axis the rows.

    Args:
        csv_path: CSV in UTF-8 with a header.
        path: of a .npz.
        targets: columns to predict.
        inputs: columns to read; default of rows all others, of a series all, the targets' own past too.
        window: rows that a forecast reads.
        horizon: rows that it predicts, default 1.
        stride: rows from one window to the next; default 1 in train and calibration, and `horizon` in the other splits,
            so that no row is judged twice.
        unit: of the targets, for people.
        standardise: the model learns ``(target - mean) / deviation`` of the train rows; answers are in the unit.
        standardise_inputs: columns of a CSV file are read so too; `predict` does the same to a CSV file, while arrays
            are taken as they are.
        metric: ``mse``, ``mae`` or ``r2``.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split of rows; equal rows stay together.

    Raises:
        DataError: arguments that do not go together, a cell that is no finite number, a column that does not change in
            train, or too few rows.
    """
    _check_steps(window, horizon, stride)
    horizon = 1 if horizon is None else horizon
    options: dict[str, Any] = {"unit": unit, "standardise": standardise, "metric": metric}
    if (csv_path is None) == (path is None):
        raise DataError("a regression needs a csv_path with a table, or a path with arrays (.npz), one of both")
    if csv_path is None:
        if targets or inputs is not None or window is not None:
            raise DataError("targets, inputs and window name columns of a CSV file: leave them out for a .npz")
        assert path is not None
        file = Path(path)
        x, y = _arrays(file)
        digests = {file: content_digest(file)}
        if len(x) < _LEAST_ROWS:
            raise DataError(f"{file} has {len(x)} rows: at least {_LEAST_ROWS} are needed for four splits")
        task = Regression.from_arrays(
            x, y, fractions=fractions, seed=seed, name=file.stem, file_digests=digests, **options
        )
        _refuse_constant_arrays(file, task)
        return task
    table = Path(csv_path)
    try:
        read, predicted = _columns(table, inputs, targets, window)
        rows = read_columns(table, (*read, *predicted))
    except InputError as error:
        raise DataError(str(error)) from None
    if len(rows) < _LEAST_ROWS:
        raise DataError(f"{table} has {len(rows)} rows: at least {_LEAST_ROWS} are needed for four splits")
    past, future = rows[:, : len(read)], rows[:, len(read) :].astype(np.float32)
    digest = content_digest(table)
    if window is None:
        chosen = _dealt(past, future, fractions, seed)
    else:
        chosen = {name: list(stretch) for name, stretch in stretches_in_time(len(rows), fractions).items()}
    _refuse_constant(table, (*read, *predicted), rows[chosen.get("train", [])])
    preprocessing = _preprocessing(read, past[chosen["train"]], window, standardise_inputs)
    known = standardised(past, preprocessing)
    splits: dict[SplitName, Any]
    if window is None:
        splits = {name: (known[at], future[at]) for name, at in chosen.items()}
        columns: tuple[str, ...] = tuple(predicted)
    else:
        found = {
            name: windows(
                known,
                future,
                range(at[0], at[-1] + 1),
                window,
                horizon,
                _STRIDES.get(name, horizon) if stride is None else stride,
            )
            for name, at in chosen.items()
            if at
        }
        one = len(predicted) == 1
        splits = _without_repetitions({name: (x, y[:, 0] if one else y) for name, (x, y) in found.items()})
        columns = tuple(f"{predicted[0]}+{step}" for step in range(1, horizon + 1)) if one else tuple(predicted)
    return Regression(
        splits,
        columns=columns,
        preprocessing=preprocessing,
        name=table.stem,
        file_digests={table: digest},
        **options,
    )


def _columns(
    table: Path, inputs: Sequence[str] | None, targets: Sequence[str], window: int | None
) -> tuple[list[str], list[str]]:
    """Names of the columns that are read, and of those that are predicted."""
    there = header_of(table)
    if not targets:
        raise DataError(f"name the targets, columns of {table} to predict; it has {', '.join(there) or 'none'}")
    wanted = [name for name in there if window is not None or name not in targets] if inputs is None else list(inputs)
    for what, names in (("targets", targets), ("inputs", wanted)):
        if isinstance(names, str) or len(set(names)) < len(names) or not names:
            raise DataError(f"{what} are {names!r}: give a list of columns of {table}, each once")
    both = [name for name in wanted if name in targets]
    if both and window is None:
        raise DataError(f"column {both[0]!r} of {table} is an input and a target: the answer would be given away")
    return wanted, list(targets)


def _dealt(
    past: NDArray[np.float64], future: NDArray[np.float32], fractions: Mapping[SplitName, float] | None, seed: int
) -> dict[SplitName, list[int]]:
    split = ArraySplit([np.ascontiguousarray(past.astype(np.float32))], future)
    together = torch.zeros(len(past), dtype=torch.int64)
    dealt = stratified_split(split.sample_digests, together, ("all",), fractions, seed)
    if "train" not in dealt:
        raise DataError("fractions name no share of train, whose mean and deviation are needed")
    return dealt


def _refuse_constant(table: Path, columns: Sequence[str], train: NDArray[np.float64]) -> None:
    """A column that never changes tells nothing, and has no deviation to be divided by."""
    if not len(train):
        raise DataError("fractions leave no row for train, whose mean and deviation are needed")
    for name, column in zip(columns, train.T, strict=True):
        # a deviation of 0 or of no float32 is that of rounding, and would make all rows infinite
        if (column == column[0]).all() or column.std() < float(np.finfo(np.float32).tiny):
            raise DataError(
                f"{table}: column {name!r} is {column[0]:g} in all {len(column)} rows of train: leave it out"
            )


def _refuse_constant_arrays(file: Path, task: Regression) -> None:
    """As `_refuse_constant`, of targets and of inputs that are columns; pixels of images may be constant."""
    if "train" not in task.splits:
        return
    train = task.splits["train"]
    for name, x in (("inputs", train.batch(range(len(train))).inputs[0]), ("targets", train.targets)):
        if x.dim() > 2:
            continue
        still = (x == x[:1]).reshape(len(x), -1).all(dim=0).nonzero().flatten().tolist()
        if still:
            raise DataError(
                f"{file}: column {still[0]} of {name} is the same in all {len(x)} rows of train: leave it out"
            )


def _check_steps(window: int | None, horizon: int | None, stride: int | None) -> None:
    """Whole positive numbers; those of a series for a series alone."""
    for name, value in (("window", window), ("horizon", horizon), ("stride", stride)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {value!r}: give a number of rows, at least 1")
        if window is None:
            raise DataError(f"{name} is of forecasts, which need a window: give it too, or leave {name} out")


def _preprocessing(
    columns: Sequence[str], train: NDArray[np.float64], window: int | None, standardise: bool
) -> Preprocessing:
    mean, std = ((), ()) if not standardise else (tuple(x.tolist()) for x in (train.mean(axis=0), train.std(axis=0)))
    return Preprocessing(kind="table", columns=tuple(columns), window=window, mean=mean, std=std)


def _without_repetitions(
    found: Mapping[SplitName, tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> dict[SplitName, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A series that repeats itself has equal windows in several splits: they stay in the last one alone."""
    kept: dict[SplitName, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    seen: set[bytes] = set()
    for name in [name for name in reversed(SPLITS) if name in found]:
        x, y = found[name]
        own = [window.tobytes() for window in x]
        rows = [row for row, content in enumerate(own) if content not in seen]
        if not rows:
            raise DataError(
                f"every window of {name} comes again in a later split, the series repeats itself: give another"
            )
        kept[name] = (x[rows], y[rows])
        seen.update(own)
    return {name: kept[name] for name in SPLITS if name in kept}


def _arrays(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """``inputs`` and ``targets`` of a .npz, without pickle, floats as float32."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = [name for name in ("inputs", "targets") if name not in archive]
            if missing:
                raise DataError(
                    f"{file} has no array {missing[0]!r}; it has {', '.join(archive) or 'none'}: "
                    "save it with numpy.savez(file, inputs=..., targets=...)"
                )
            x, y = archive["inputs"], archive["targets"]
    except DataError:
        raise
    except Exception as error:  # numpy raises zipfile's, its own and plain ValueError
        raise DataError(f"{file} cannot be read as a .npz without pickle ({error}): save it with numpy.savez") from None
    return _numbers(file, "inputs", x), _numbers(file, "targets", y)


def _numbers(file: Path, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Floats as float32, which has room for each; whole numbers as they are."""
    if array.dtype.kind not in "fiu" or array.ndim == 0:
        raise DataError(f"{file}: {name} are {array.dtype} {list(array.shape)}: give numbers, first axis the rows")
    if array.dtype.kind != "f":
        return array
    rows = np.abs(array).reshape(len(array), -1)
    bad = np.flatnonzero(~(rows <= np.finfo(np.float32).max).all(axis=1))
    if len(bad):
        raise DataError(f"{file}: row {bad[0]} of {name} holds NaN, infinity or what is beyond float32: mend it")
    return array.astype(np.float32)
