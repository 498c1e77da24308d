"""PyTorch against the exported file: every row of the split, every exit forced, every optimization level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, GoldenCase, ParityReport, TensorSpec
from edgewright.edge_runtime.errors import ExportError, ParityError
from edgewright.edge_runtime.inference.feeds import specs_of
from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import session_on
from edgewright.models.layers.multi_exit import MultiExit

from ..graph.capture import flat_name
from ..source import Source
from .agreement import Agreement, Arrays, possible_shifts
from .subject import BATCH, Reference, Subject, answers_in, spread_evenly

_DEFAULT_LEVEL = "all"
_ERROR_ROWS = 256
_LEVEL_ERROR_ROWS = 4
_LEVEL_ROWS = 2
_FORCED_ROWS = 32
_MIXED_ROWS = 7
_BISECTIONS = 8
_GOLDEN_ROWS = 16
_GOLDEN_FORCED_ROWS = 2
_GOLDEN_BYTES = 2**26


@dataclass
class ParityResult:
    """The report, the recorded cases, and what the exported file answered on the split.

    Attributes:
        report: for the manifest.
        golden: for golden.npz.
        flip_margin: twice the largest logit error that was measured; in the units of the cases' margins.
        label: int64 [rows], from the exported file, see `Reference.labels`.
        exit_index: int64 [rows], from the exported file.
        inputs: as ONNX Runtime reads them from the exported file.
        outputs: the same.
        failures: why parity does not hold; empty if it does.
    """

    report: ParityReport
    golden: list[GoldenCase]
    flip_margin: float
    label: NDArray[np.int64]
    exit_index: NDArray[np.int64]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    failures: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Raises if parity does not hold.

        Raises:
            ParityError: lists the first failures.
        """
        if self.failures:
            shown = "\n  ".join(self.failures[:8])
            more = f"\n  and {len(self.failures) - 8} more" if len(self.failures) > 8 else ""
            raise ParityError(f"ONNX and PyTorch disagree, no bundle was written:\n  {shown}{more}")


def check_parity(
    model: nn.Module,
    flat_path: Path,
    model_path: Path,
    source: Source,
    split: str,
    *,
    abs_tol: float = 1e-4,
    rel_tol: float = 1e-4,
    rows: int | None = None,
    points: Mapping[str, Sequence[float]] | None = None,
) -> ParityResult:
    """Holds the exported file to the PyTorch model.

    Args:
        model: what was exported.
        flat_path: the flat graph that gives the logits of every head.
        model_path: the final file.
        source: gives real inputs.
        split: which of its splits.
        abs_tol: see `Tolerances`.
        rel_tol: see `Tolerances`.
        rows: at most so many rows of the split, spread evenly; None: all.
        points: thresholds of operating points beside those that the model holds, by name.

    Raises:
        ExportError: an exit that no row can take in PyTorch either, so that its branch cannot be proven.
        ParityError: ONNX Runtime cannot run the file.
    """
    data = source.splits[split]
    runner = session_on(model_path, threads=1)
    subject = Subject(
        Reference(model, answers_in(model, source)),
        flat_path,
        model_path,
        source,
        split,
        spread_evenly(len(data), rows),
        runner,
    )
    reference = subject.torch
    forced_rows = [_rows_reaching(subject, k) for k in range(reference.exits + 1)] if reference.exits else []
    check = Agreement(abs_tol, rel_tol, reference.specs)
    shifts = possible_shifts(_logit_errors(subject, _ERROR_ROWS, _DEFAULT_LEVEL, check))
    label, exit_index, golden = _natural(subject, shifts, check)
    covered = _forced(subject, forced_rows, shifts, check, golden) if reference.exits else 1
    for name, thresholds in (points or {}).items():
        _point(subject, name, list(thresholds), shifts, check, golden)
    mixing = _mixing_thresholds(subject) if reference.exits and not subject.single_rows else None
    _batch_sizes(subject, mixing, shifts, check, golden)
    everywhere = check.max_abs  # so far everything ran at the default level
    levels = {**_levels(subject, forced_rows, mixing, check), _DEFAULT_LEVEL: everywhere}
    report = ParityReport(
        max_abs_diff=check.max_abs,
        fraction_outside=check.outside / max(1, check.elements),
        rows=check.rows,
        label_agreement=1.0 - check.label_flips / max(1, check.decided) if reference.decides else None,
        exit_agreement=1.0 - check.exit_flips / max(1, check.rows),
        exits_covered=covered,
        exits_total=reference.exits + 1,
        excused=tuple(check.flips),
        optimization_levels=levels,
    )
    inputs, outputs = specs_of(runner.session.get_inputs()), specs_of(runner.session.get_outputs())
    return ParityResult(report, golden, max(shifts), label, exit_index, inputs, outputs, check.failures)


def _logit_errors(subject: Subject, count: int, level: str, check: Agreement) -> list[float]:
    """Holds the logits of every head to the tolerance; their largest error, per head, says what may flip.

    Without exits those of every answer, and what decides nothing makes nothing flip.
    """
    runner = session_on(subject.flat_path, threads=1, optimization_level=level)
    rows = subject.spread(count)
    largest = [0.0] * (subject.torch.exits + len(subject.torch.specs))
    for start in range(0, len(rows), subject.batch):
        some = rows[start : start + subject.batch]
        got = subject.answers(subject.inputs(some), None, runner)
        for head, want in enumerate(subject.logits(some)):
            what = f"{subject.torch.named(head)}, rows from {rows[start]}, optimization level {level}"
            error = check.numbers(what, got[flat_name(head)], want.numpy())
            if subject.torch.decides_by(head):
                largest[head] = max(largest[head], error)
    return largest


def _natural(
    subject: Subject, shifts: Sequence[float], check: Agreement
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[GoldenCase]]:
    """Every chosen row with the thresholds that are stored: labels, exits, and the golden case of some rows.

    Those are up to 16 rows spread evenly, so that their mix of exits is the split's, fewer where outputs are large;
    the forced cases cover every exit.
    """
    reference = subject.torch
    labels, exits, kept = [], [], []
    picked: set[int] = set()
    for start in range(0, len(subject.rows), subject.batch):
        indices = subject.rows[start : start + subject.batch]
        got = subject.answers(subject.inputs(indices), None)
        want, margin = reference.answer(subject.logits(indices), reference.thresholds, shifts)
        check.answers("", subject.split, indices, got, want, margin, max(shifts))
        labels.append(reference.labels(got))
        exits.append(got.get(EXIT_INDEX, np.zeros(len(indices), np.int64)))
        if start == 0:
            row_bytes = sum(value[:1].nbytes for value in got.values())
            most = max(1, min(_GOLDEN_ROWS, _GOLDEN_BYTES // max(1, row_bytes)))
            picked = set(spread_evenly(len(subject.rows), most))
        mine = [i - start for i in range(start, start + len(indices)) if i in picked]
        kept.append({name: value[mine] for name, value in got.items()})
    joined = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
    golden = _case(subject, [subject.rows[i] for i in sorted(picked)], joined, reference.thresholds, shifts)
    return np.concatenate(labels), np.concatenate(exits), [golden]


def _point(
    subject: Subject,
    name: str,
    thresholds: list[float],
    shifts: Sequence[float],
    check: Agreement,
    golden: list[GoldenCase],
) -> None:
    """Up to 16 rows at another operating point, which a device may switch to and verify by its name."""
    rows = subject.spread(_GOLDEN_ROWS)
    got = subject.answers(subject.inputs(rows), thresholds)
    want, margin = subject.torch.answer(subject.logits(rows), thresholds, shifts)
    own = check.fresh()
    own.answers(f"operating point {name}", subject.split, rows, got, want, margin, max(shifts))
    check.beside(own)
    golden.append(_case(subject, rows, got, thresholds, shifts))


def _case(
    subject: Subject,
    rows: Sequence[int],
    got: Arrays,
    thresholds: list[float] | None,
    shifts: Sequence[float],
) -> GoldenCase:
    want, margin = subject.torch.answer(subject.logits(rows), thresholds, shifts)
    return GoldenCase(
        inputs=subject.feeds(subject.inputs(rows)),
        torch=want,
        reference=got,
        thresholds=None if thresholds is None else np.asarray(thresholds, np.float32),
        margin=margin,
    )


def _rows_reaching(subject: Subject, exit_index: int) -> list[int]:
    """Up to 32 rows to force to an exit: spread evenly if one of them gets there, else looked for in the whole split.

    Raises:
        ExportError: no row of the split gets there.
    """
    model = subject.torch.model
    assert isinstance(model, MultiExit)
    thresholds = torch.tensor(subject.torch.forced()[exit_index], dtype=torch.float32)

    def reached(rows: Sequence[int]) -> list[int]:
        logits = subject.logits(rows)
        there = model.decide(logits, thresholds).exit_index == exit_index
        return [row for row, yes in zip(rows, there.tolist(), strict=True) if yes]

    spread = subject.spread(_FORCED_ROWS)
    if reached(spread):
        return spread
    total = len(subject.source.splits[subject.split])
    for start in range(0, total, BATCH):
        found = reached(list(range(start, min(start + BATCH, total))))
        if found:
            return found[:_FORCED_ROWS]
    raise ExportError(_out_of_reach(subject, model, exit_index, total, spread))


def _out_of_reach(subject: Subject, model: MultiExit, exit_index: int, total: int, rows: Sequence[int]) -> str:
    logits = subject.logits(rows)[exit_index]
    place = [spec.at for spec in model.specs][exit_index : exit_index + 1] or ["the network's own end"]
    return (
        f"exit {exit_index} at {place[0]!r} can be taken by none of the {total} rows of the split "
        f"{subject.split!r}, whatever its threshold, in PyTorch either: the best classes of its head tie exactly in "
        f"float32 (logits from {float(logits.min()):.4g} to {float(logits.max()):.4g}), so the branch behind it cannot "
        "be proven and would never save anything. A head that ties is constant or saturated: train it with a lower "
        "learning rate, normalise the inputs, leave this exit out or place it deeper, or choose policy: "
        "max_probability, which ties do not hold back"
    )


def _forced(
    subject: Subject,
    forced_rows: Sequence[Sequence[int]],
    shifts: Sequence[float],
    check: Agreement,
    golden: list[GoldenCase],
) -> int:
    """Sends rows to every exit by moving the thresholds; returns how many exits were reached."""
    reference = subject.torch
    covered = 0
    for k, (thresholds, rows) in enumerate(zip(reference.forced(), forced_rows, strict=True)):
        got = subject.answers(subject.inputs(rows), thresholds)
        want, margin = reference.answer(subject.logits(rows), thresholds, shifts)
        own = check.fresh()
        own.answers(f"exit {k} forced", subject.split, rows, got, want, margin, max(shifts))
        check.beside(own)
        there = np.flatnonzero(got[EXIT_INDEX] == k)
        if len(there) == 0:
            check.failures.append(
                f"exit {k} was not reached by any of {len(rows)} rows although it was forced and PyTorch reaches it"
            )
            continue
        covered += 1
        few = there[:_GOLDEN_FORCED_ROWS].tolist()
        answers = {name: value[few] for name, value in got.items()}
        golden.append(_case(subject, [rows[i] for i in few], answers, thresholds, shifts))
    return covered


def _levels(
    subject: Subject, forced_rows: Sequence[Sequence[int]], mixing: list[float] | None, check: Agreement
) -> dict[str, float]:
    """Largest difference of the numbers at every other graph optimization level, every exit forced.

    What may flip at a level is what the logits are off by at that level.
    """
    reference = subject.torch
    settings: list[tuple[str, list[float] | None, list[int]]] = [
        ("", None, subject.spread(_LEVEL_ROWS)),
        *(
            (
                f", exit {k} forced",
                thresholds,
                [forced_rows[k][i] for i in spread_evenly(len(forced_rows[k]), _LEVEL_ROWS)],
            )
            for k, thresholds in enumerate(reference.forced() if reference.exits else ())
        ),
    ]
    if mixing is not None:
        settings.append((", rows leaving at different exits", mixing, subject.spread(_MIXED_ROWS)))
    found = {}
    for level in OPTIMIZATION_LEVELS:
        if level != _DEFAULT_LEVEL:
            own = check.fresh()
            _level(subject, level, settings, own)
            found[level] = own.max_abs
            check.beside(own)
    return found


def _level(
    subject: Subject, level: str, settings: Sequence[tuple[str, list[float] | None, list[int]]], check: Agreement
) -> None:
    """One level; its sessions, each with all weights, end with it."""
    shifts = possible_shifts(_logit_errors(subject, _LEVEL_ERROR_ROWS, level, check))
    runner = session_on(subject.model_path, threads=1, optimization_level=level)
    for what, thresholds, rows in settings:
        want, margin = subject.torch.answer(subject.logits(rows), thresholds, shifts)
        got = subject.answers(subject.inputs(rows), thresholds, runner)
        check.answers(f"optimization level {level}{what}", subject.split, rows, got, want, margin, max(shifts))


def _mixing_thresholds(subject: Subject) -> list[float]:
    """Thresholds with which every exit, and the network's end, takes about as many of up to 32 rows as the others."""
    model = subject.torch.model
    assert isinstance(model, MultiExit)
    logits = subject.logits(subject.spread(_FORCED_ROWS))
    exits = subject.torch.exits
    thresholds = torch.full((exits,), model.policy.never, dtype=torch.float32)
    for k in range(exits):
        few, many = model.policy.never, model.policy.always
        for _ in range(_BISECTIONS):
            thresholds[k] = (few + many) / 2
            gone = int((model.decide(logits, thresholds).exit_index <= k).sum())
            if gone * (exits + 1) > len(logits[0]) * (k + 1):
                many = float(thresholds[k])
            else:
                few = float(thresholds[k])
        thresholds[k] = few
    return [float(t) for t in thresholds]


def _batch_sizes(
    subject: Subject,
    mixing: list[float] | None,
    shifts: Sequence[float],
    check: Agreement,
    golden: list[GoldenCase],
) -> None:
    """A batch axis that is declared dynamic must take several sizes, one row included; with exits, none too.

    Rows that leave at different exits must not disturb each other, in whatever order they come.
    """
    if subject.single_rows:
        return
    total = len(subject.source.splits[subject.split])
    rows_of = [[i % total for i in range(size)] for size in (1, 2, 7)]
    if mixing is not None:
        spread = subject.spread(_FORCED_ROWS)
        rows_of += [spread, spread[::-1]]
    for rows in rows_of:
        want, margin = subject.torch.answer(subject.logits(rows), mixing, shifts)
        own = check.fresh()
        got = subject.answers(subject.inputs(rows), mixing)
        what = f"batch of {len(rows)}" + (", rows leaving at different exits" if mixing is not None else "")
        own.answers(what, subject.split, rows, got, want, margin, max(shifts))
        check.beside(own)
    if mixing is None:
        return
    few = [rows_of[-2][i] for i in spread_evenly(len(rows_of[-2]), _GOLDEN_ROWS)]
    inputs = subject.inputs(few)
    golden.append(_case(subject, few, subject.answers(inputs, mixing), mixing, shifts))
    nothing = subject.answers([x[:0] for x in inputs], mixing)
    for name, value in nothing.items():
        if value.shape != (0, *want[name].shape[1:]):
            check.failures.append(f"batch without rows: {name} has shape {list(value.shape)}")
