"""The shipped task `regression`: what it reads, what it refuses, and that its metrics are torchmetrics'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics

from edgewright.edge_runtime import load_table
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import SPLITS, data_digests
from edgewright.pipeline.tasks.regression import Regression
from edgewright.pipeline.tasks.shipped.regression import regression
from edgewright.pipeline.tasks.shipped.synthetic_forecast import synthetic_forecast


def table(folder: Path, rows: int = 60, name: str = "t.csv", **columns: Any) -> Path:
    rng = np.random.default_rng(0)
    known = {"a": 5 + 2 * rng.normal(size=rows), "b": 1000 * rng.normal(size=rows), **columns}
    known.setdefault("y", known["a"] * 3 + 7)
    lines = [",".join(known), *(",".join(map(str, row)) for row in zip(*known.values(), strict=True))]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_rows_are_standardised_by_train_and_read_so_on_the_device(tmp_path: Path) -> None:
    file = table(tmp_path)
    task = regression(file, targets=["y"], unit="mm")
    train = task.splits["train"].batch(range(len(task.splits["train"]))).inputs[0]
    assert torch.allclose(train.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(train.std(0, correction=0), torch.ones(2), atol=1e-6)
    assert task.preprocessing.columns == ("a", "b") and task.answers[0].labels == ("y",)
    read = torch.from_numpy(load_table(file, task.preprocessing))
    rows = torch.cat([split.batch(range(len(split))).inputs[0] for split in task.splits.values()])
    assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, rows.tolist())), "the very same numbers"
    targets = torch.cat([split.targets for split in task.splits.values()])
    assert 5 < float(targets.mean()) < 40, "in the unit of the data"
    assert list(task.file_digests) == [file] and task.splits.keys() == set(SPLITS)
    assert task.answers[0].scale and task.answers[0].offset


def test_a_series_predicts_no_row_twice_and_shares_none(tmp_path: Path) -> None:
    hour = np.arange(300.0)
    file = table(tmp_path, 300, hour=hour, y=hour)
    task = regression(file, targets=["y"], inputs=["y", "a"], window=5, horizon=3, standardise_inputs=False)
    seen: list[set[float]] = []
    for name in SPLITS:
        split = task.splits[name]
        batch = split.batch(range(len(split)))
        x, y = batch.inputs[0], batch.targets
        assert x.shape[1:] == (2, 5) and y.shape[1:] == (3,)
        assert torch.equal(y[:, 0], x[:, 0, -1] + 1), "what comes next"
        if name in ("validation", "test"):
            assert len(set(y.flatten().tolist())) == y.numel()
        seen.append({*x[:, 0].flatten().tolist(), *y.flatten().tolist()})
    assert all(not a & b for i, a in enumerate(seen) for b in seen[i + 1 :])
    assert task.answers[0].labels == ("y+1", "y+2", "y+3")
    several = regression(file, targets=["y", "b"], inputs=["a"], window=5, horizon=3)
    assert several.splits["test"].targets.shape[1:] == (2, 3) and several.answers[0].labels == ("y", "b")


def test_a_series_that_repeats_itself_keeps_equal_windows_in_one_split(tmp_path: Path) -> None:
    day = np.tile(np.arange(7.0), 60)
    day += np.where(
        (np.arange(420) < 200) | ((np.arange(420) >= 250) & (np.arange(420) < 340)), np.arange(420) / 1e3, 0
    )
    task = regression(table(tmp_path, 420, y=day), targets=["y"], inputs=["y"], window=4, horizon=2)
    data_digests(task)
    assert len(task.splits["train"]) < 247, "some of train come again in test"
    with pytest.raises(DataError, match=r"every window of .* comes again in a later split"):
        regression(table(tmp_path, 420, y=np.tile(np.arange(7.0), 60)), targets=["y"], inputs=["y"], window=4)


def test_arrays_of_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", inputs=rng.normal(size=(40, 2, 3)), targets=rng.normal(size=(40, 2)))
    task = regression(path=tmp_path / "d.npz")
    assert task.splits["train"].batch([0]).inputs[0].dtype == torch.float32 and task.preprocessing.kind == "none"
    np.savez(tmp_path / "e.npz", inputs=np.zeros((4, 2)))
    with pytest.raises(DataError, match=r"e\.npz has no array 'targets'; it has inputs"):
        regression(path=tmp_path / "e.npz")
    np.savez(tmp_path / "o.npz", inputs=np.array([object()] * 30), targets=np.zeros(30))
    with pytest.raises(DataError, match="without pickle"):
        regression(path=tmp_path / "o.npz")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {}, "name the targets, columns of .*; it has a, b, y"),
        ({}, {"targets": ["z"]}, "line 1: no column 'z'"),
        ({}, {"targets": ["y"], "inputs": ["a", "y"]}, "column 'y' of .* is an input and a target"),
        ({}, {"targets": "y"}, "targets are 'y': give a list"),
        ({}, {"targets": ["y"], "inputs": ["a", "a"]}, "each once"),
        ({"b": [3] * 60}, {"targets": ["y"]}, "column 'b' is 3 in all 36 rows of train: leave it out"),
        ({"b": [*range(59), "nan"]}, {"targets": ["y"]}, "line 61, column 'b': nan is not finite"),
        ({"b": [*range(59), "x"]}, {"targets": ["y"]}, "line 61, column 'b': 'x' is no number"),
        ({"b": np.arange(60) * 1e-170}, {"targets": ["y"]}, "column 'b' is .* in all 36 rows of train"),
        ({}, {"targets": ["y"], "window": 4, "stride": 0}, "stride is 0: give a number of rows"),
        ({}, {"targets": ["y"], "window": 2.5}, "window is 2.5: give a number of rows"),
        ({}, {"targets": ["y"], "horizon": 4}, "horizon is of forecasts, which need a window"),
        ({}, {"targets": ["y"], "window": 10, "horizon": 2}, "a window of 10 with a horizon of 2 takes 12"),
        ({}, {"targets": ["y"], "metric": "rmsle"}, "unknown metric 'rmsle'"),
        ({}, {"targets": ["y"], "path": "d.npz"}, "one of both"),
    ],
)
def test_what_cannot_be_right_is_refused(
    columns: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        regression(table(tmp_path, **columns), **options)


_X = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (_X, np.where(np.arange(40) == 7, np.nan, _X[:, 0]), "row 7 of targets holds NaN"),
        (np.where(_X[2, 1] == _X, 1e39, _X), _X[:, 0], "row 2 of inputs holds .* beyond float32"),
        (_X.astype(str), _X[:, 0], "inputs are <U"),
        (np.float32(1), np.float32(1), r"inputs are float32 \[\]"),
        (_X[:5], _X[:5, 0], "has 5 rows: at least 20"),
        (np.concatenate([_X, np.ones((40, 1))], axis=1), _X[:, 0], "column 3 of inputs is the same in all 24 rows"),
        (_X, np.ones(40), "column 0 of targets is the same"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused_by_file(
    inputs: Any, targets: Any, message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "d.npz", inputs=inputs, targets=targets)
    with pytest.raises(DataError, match=rf"d\.npz.*{message}"):
        regression(path=tmp_path / "d.npz")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 8 rows: at least 20"):
        regression(table(tmp_path, 8), targets=["y"])


@pytest.mark.parametrize("name", ["mse", "mae", "r2"])
def test_metrics_are_torchmetrics(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    right, said = torch.randn(50, 3, generator=generator), torch.randn(50, 3, generator=generator)
    task = Regression({"test": (torch.zeros(50, 2) + torch.arange(50.0)[:, None], right)}, metric=name)
    theirs = {
        "mse": torchmetrics.MeanSquaredError(),
        "mae": torchmetrics.MeanAbsoluteError(),
        "r2": torchmetrics.R2Score(),
    }[name]
    score = task.metric.score([(said[:20], right[:20]), (said[20:], right[20:])])
    assert score.value == pytest.approx(float(theirs(said.flatten(), right.flatten())), rel=1e-5)


def test_the_series_that_is_made_up_needs_both_columns() -> None:
    task = synthetic_forecast(rows=1500, window=24, horizon=4)
    errors = []
    for columns in ([0], [0, 1]):
        x, y = (
            torch.cat([task.splits[name].batch(range(len(task.splits[name]))).inputs[0] for name in names])
            for names in (["train"], ["test"])
        )
        a, b = (torch.cat([z[:, columns].flatten(1), torch.ones(len(z), 1)], dim=1).double() for z in (x, y))
        weights = torch.linalg.lstsq(a, task.splits["train"].targets.double()).solution
        errors.append(float((b @ weights - task.splits["test"].targets).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[0] < float(task.splits["test"].targets.var())
