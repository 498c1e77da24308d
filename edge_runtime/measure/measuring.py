"""The inside of a measuring process: create sessions, warm them up, take samples. Started by `child`.

The clock runs around ``session.run`` alone, with numpy arrays in and out. Nothing is profiled here, ever:
ONNX Runtime's profiler makes small graphs many times slower.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import bundle_of
from ..bundle.golden import read_npz, write_npz
from ..bundle.manifest import EXIT_INDEX, THRESHOLDS
from ..errors import EdgewrightError
from ..inference.feeds import check_feeds
from ..inference.options import SessionOptions
from ..inference.runner import Runner
from ..inference.session import bundle_session, session_files, session_on

WINDOW = 20
"""Runs in one warm-up window."""

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class WarmUp:
    """How a session was warmed up; a session that never settled is measured all the same, and says so."""

    runs: int
    seconds: float
    settled: bool
    rule: str = (
        "at least 10 runs and 0.5 s, then until two successive windows of 20 runs over the same inputs agree "
        "within 2 % in the median"
    )


def warm_up(
    run_once: Callable[[int], int],
    *,
    min_runs: int = 10,
    min_seconds: float = 0.5,
    max_seconds: float = 10.0,
    agreement: float = 0.02,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> WarmUp:
    """Runs until the latency has settled.

    Both windows run the same sequence of inputs and are compared run by run, so that a mix of exits does not
    look like a change.

    Args:
        run_once: runs input i (any non-negative number) and returns its latency in ns.
        min_runs: runs before the first window.
        min_seconds: seconds before the first window.
        max_seconds: gives up after this.
        agreement: largest change of the median.
        clock: in ns.
    """
    start, runs = clock(), 0

    def seconds() -> float:
        return (clock() - start) / 1e9

    while (runs < min_runs or seconds() < min_seconds) and seconds() < max_seconds:
        run_once(runs)
        runs += 1
    before: NDArray[np.float64] | None = None
    while seconds() < max_seconds:
        window = np.array([run_once(i) for i in range(WINDOW)], np.float64)
        runs += WINDOW
        if before is not None and abs(float(np.median(window / before)) - 1) <= agreement:
            return WarmUp(runs, seconds(), True)
        before = np.maximum(window, 1.0)
    return WarmUp(runs, seconds(), False)


class Subject:
    """One artefact in a measuring process: a session, its inputs, and the clock around it."""

    def __init__(self, runner: Runner, feeds: Sequence[Feed]) -> None:
        self.runner = runner
        self.feeds = [dict(feed) for feed in feeds]
        names = runner.output_names
        self._exit_at = names.index(EXIT_INDEX) if EXIT_INDEX in names else None
        self._last: list[NDArray[Any]] = []

    def run_once(self, index: int) -> int:
        """Runs one input, cycled; returns ns."""
        feed = self.feeds[index % len(self.feeds)]
        run = self.runner.session.run
        start = time.perf_counter_ns()
        self._last = run(None, feed)
        return time.perf_counter_ns() - start

    def forced(self, thresholds: NDArray[np.float32]) -> Subject:
        """The same session and inputs with thresholds that go in at every run."""
        return Subject(self.runner, [{**feed, THRESHOLDS: thresholds} for feed in self.feeds])

    def last_exit(self) -> int:
        """Deepest exit of the last run's rows; -1 for a model without exits."""
        if self._exit_at is None:
            return -1
        self.runner.require_known(self._last)
        return int(self._last[self._exit_at].max())


def main(started_ns: int, spec_path: str) -> None:
    """Entry of the measuring process.

    Args:
        started_ns: ``time.perf_counter_ns()`` before anything was imported.
        spec_path: JSON written by `child.run_child`; its ``result`` is the folder for the answer.
    """
    import onnxruntime  # noqa: F401  # its import is one of the phases

    imported_ns = time.perf_counter_ns()
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    folder = Path(spec["result"])
    answer: dict[str, Any]
    try:
        measure = {"single": _single, "interleaved": _interleaved, "exits": _exits}[spec["mode"]]
        answer, arrays = measure(spec)
        answer["phases_ms"] = {"import": (imported_ns - started_ns) / 1e6, **answer["phases_ms"]}
        write_npz(folder / "samples.npz", arrays)
    except EdgewrightError as error:
        answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def read_feeds(path: str | os.PathLike[str]) -> list[dict[str, NDArray[Any]]]:
    """Reads what `write_feeds` wrote."""
    feeds: dict[str, dict[str, NDArray[Any]]] = {}
    for key, value in sorted(read_npz(path).items()):
        index, name = key.split("/", 1)
        feeds.setdefault(index, {})[name] = value
    return list(feeds.values())


def write_feeds(path: str | os.PathLike[str], feeds: Sequence[Feed]) -> None:
    """Writes the inputs of every run into one .npz."""
    write_npz(path, {f"{i:06d}/{name}": value for i, feed in enumerate(feeds) for name, value in feed.items()})


def _single(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    (artefact,) = spec["artefacts"]
    subject, phases, create_bytes = _subject(artefact)
    warm = warm_up(subject.run_once)
    load_before = _load_average()
    order = _shuffled_cycle(len(subject.feeds), spec["seed"])
    samples, exits = [], []
    gc.collect()
    gc.disable()
    start = time.perf_counter_ns()
    while True:
        samples.append(subject.run_once(next(order)))
        exits.append(subject.last_exit())
        seconds = (time.perf_counter_ns() - start) / 1e9
        enough = len(samples) >= spec["min_samples"] and seconds >= spec["min_seconds"]
        if enough or seconds >= spec["max_seconds"]:
            break
    gc.enable()
    answer = {
        "phases_ms": phases,
        "placement": subject.runner.placement.to_dict(),
        "warmup": asdict(warm),
        "duration_s": seconds,
        "memory": {
            "rss_create_delta_bytes": create_bytes,
            "rss_run_peak_bytes": _status_bytes("VmHWM"),
        },
        "load_average": {"before": load_before, "after": _load_average()},
    }
    return answer, {"samples": np.array(samples, np.int64), "exits": np.array(exits, np.int64)}


def _interleaved(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    subjects, phases, warm = [], {}, []
    for artefact in spec["artefacts"]:
        subject, phases[artefact["name"]], _ = _subject(artefact)
        subjects.append(subject)
        warm.append(asdict(warm_up(subject.run_once, max_seconds=spec["warmup_seconds"])))
    blocks, runs = spec["blocks"], spec["block_runs"]
    samples = np.zeros((len(subjects), blocks, runs), np.int64)
    exits = np.zeros_like(samples)
    rng = np.random.default_rng(spec["seed"])
    order = _shuffled_cycle(max(len(subject.feeds) for subject in subjects), spec["seed"])
    gc.collect()
    gc.disable()
    for block in range(blocks):
        inputs = list(itertools.islice(order, runs))  # the same for every artefact: the block is the pair
        for which in rng.permutation(len(subjects)).tolist():
            subject = subjects[which]
            subject.run_once(inputs[-1])  # brings its weights back into the caches, untimed
            for run, index in enumerate(inputs):
                samples[which, block, run] = subject.run_once(index)
                exits[which, block, run] = subject.last_exit()
    gc.enable()
    answer = {
        "phases_ms": phases,
        "placement": [subject.runner.placement.to_dict() for subject in subjects],
        "warmup": warm,
    }
    return answer, {"samples": samples, "exits": exits}


def _exits(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Every artefact with every setting of the thresholds, which go in as an input of each run."""
    settings = [np.asarray(values, np.float32) for values in spec["exit_thresholds"]]
    subjects, phases, warm = [], {}, []
    for artefact in spec["artefacts"]:
        subject, phases[artefact["name"]], _ = _subject(artefact)
        subjects.append([subject.forced(values) for values in settings])
        for forced in subjects[-1]:
            warm.append(asdict(warm_up(forced.run_once, min_seconds=0.1, max_seconds=spec["warmup_seconds"])))
    blocks, runs = spec["blocks"], spec["block_runs"]
    samples = np.zeros((len(subjects), len(settings), blocks, runs), np.int64)
    exits = np.zeros_like(samples)
    rng = np.random.default_rng(spec["seed"])
    places = [(which, k) for which in range(len(subjects)) for k in range(len(settings))]
    order = _shuffled_cycle(len(subjects[0][0].feeds), spec["seed"])
    gc.collect()
    gc.disable()
    for block in range(blocks):
        inputs = list(itertools.islice(order, runs))
        for place in rng.permutation(len(places)).tolist():
            which, k = places[place]
            subject = subjects[which][k]
            subject.run_once(inputs[-1])  # brings its weights back into the caches, untimed
            for run, index in enumerate(inputs):
                samples[which, k, block, run] = subject.run_once(index)
                exits[which, k, block, run] = subject.last_exit()
    gc.enable()
    placements = [forced[0].runner.placement.to_dict() for forced in subjects]
    return {"phases_ms": phases, "placement": placements, "warmup": warm}, {"samples": samples, "exits": exits}


def _subject(artefact: dict[str, Any]) -> tuple[Subject, dict[str, float], int | None]:
    """Creates the session; returns it with its phases in ms and the bytes that creating it took."""
    bundle = None
    if artefact["manifest"] is not None:
        bundle = bundle_of(artefact["manifest"], artefact["manifest_sha256"])
    feeds = read_feeds(artefact["inputs"])
    options = SessionOptions(**artefact["options"])
    with ExitStack() as stack:
        if bundle is not None:
            stack.enter_context(bundle.unchanged(session_files(bundle.manifest, options.layout)))
        resident = _status_bytes("VmRSS")
        start = time.perf_counter_ns()
        if bundle is None:
            runner = session_on(artefact["model"], options)
        else:
            runner = bundle_session(bundle.folder, bundle.manifest, options)
        created = time.perf_counter_ns()
        now_resident = _status_bytes("VmRSS")
    taken = now_resident - resident if now_resident is not None and resident is not None else None
    for feed in feeds:
        check_feeds(runner.inputs, feed)  # the timed runs do without
    subject = Subject(runner, feeds)
    first_ns = subject.run_once(0)
    return subject, {"create": (created - start) / 1e6, "first_run": first_ns / 1e6}, taken


def _shuffled_cycle(count: int, seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def _status_bytes(key: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields[key].split()[0]) * 1024 if key in fields else None


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
