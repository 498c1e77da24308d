"""Latency of the bundles of a run: each in a fresh process, and the last against the reference side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgewright import edge_runtime
from edgewright.edge_runtime.bundle.golden import write_npz
from edgewright.edge_runtime.process.scratch import Scratch

from ..recipe.recipe import BenchmarkOptions
from ..stage import Json, Progress
from ..task import Task, split_of

_MOST_INPUTS = 256


def test_inputs(task: Task) -> dict[str, NDArray[Any]]:
    """Up to 256 rows of the test split, spread evenly: real inputs, with the mix of exits that they have."""
    split = split_of(task, "test", needed_by="the benchmark")
    count = min(len(split), _MOST_INPUTS)
    rows = [i * len(split) // count for i in range(count)]
    inputs = split.batch(rows).inputs
    return {name: x.numpy() for name, x in zip(task.input_names, inputs, strict=True)}


def measure_bundles(
    made: Mapping[str, Path], task: Task, options: BenchmarkOptions, seed: int, progress: Progress
) -> list[dict[str, Json]]:
    """A row of `edge_runtime.bench` for every bundle, with its ``step``.

    Args:
        made: bundle by step.
        task: gives the inputs.
        options: see `BenchmarkOptions`.
        seed: of the order of the inputs.
        progress: told which step is measured.

    Raises:
        ProviderError: a provider that was asked for is not there.
    """
    inputs = test_inputs(task)
    rows = []
    for step, bundle in made.items():
        progress.say(f"{step}: latency")
        row = edge_runtime.bench(
            bundle,
            edge_runtime.SessionOptions(options.providers, options.threads),
            inputs=inputs,
            min_seconds=options.seconds,
            min_samples=options.min_samples,
            seed=seed % 2**31,
        )
        rows.append({"step": step, **row.to_dict()})
    return rows


def compare_bundles(reference: Path, final: Path, task: Task, options: BenchmarkOptions, seed: int) -> dict[str, Json]:
    """Mean latency of `final` over that of `reference`, measured interleaved, with its 95 % interval.

    The mean, because with exits the latency has several modes and the mean is what a stream of inputs costs.
    """
    with Scratch("edgewright-compare-") as folder:
        path = folder / "inputs.npz"
        write_npz(path, test_inputs(task))
        measured = edge_runtime.interleaved(
            {"reference": edge_runtime.Contender(reference, path), "final": edge_runtime.Contender(final, path)},
            edge_runtime.SessionOptions(options.providers, options.threads),
            statistic="mean",
            seed=seed % 2**31,
        )
    ratio = measured.ratios["final"]
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict, "statistic": "mean"}
