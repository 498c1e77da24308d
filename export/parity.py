"""PyTorch against the exported file: every row of the split, every exit forced, every optimization level.

Float tolerance is one thing, a flipped label or exit another: both are counted. A flip is excused only where its
margin (see `ExitPolicy.margin`) is within what the measured logit error can move; it is listed (DESIGN §4 rule 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.comparison import compare, exclusion_differs
from edgewright.edge_runtime.errors import ParityError
from edgewright.edge_runtime.manifest import (
    EXIT_INDEX,
    LABEL,
    LOGITS,
    SCORES,
    Flip,
    GoldenCase,
    ParityReport,
)
from edgewright.edge_runtime.runner import Runner
from edgewright.edge_runtime.session import OPTIMIZATION_LEVELS, session_on
from edgewright.models.layers.multi_exit import MultiExit

from .capture import logits_name
from .source import Source, SourceSplit

Arrays = dict[str, NDArray[Any]]

_FORCED_ROWS = 32
_GOLDEN_ROWS = 16
_GOLDEN_FORCED_ROWS = 2
_BATCH = 64


@dataclass
class ParityResult:
    """The report, the recorded cases, and what the exported file answered on the split.

    Attributes:
        report: for the manifest.
        golden: for golden.npz.
        flip_margin: twice the largest logit error that was measured.
        label: int64 [rows], from the exported file.
        exit_index: int64 [rows], from the exported file.
        failures: why parity does not hold; empty if it does.
    """

    report: ParityReport
    golden: list[GoldenCase]
    flip_margin: float
    label: NDArray[np.int64]
    exit_index: NDArray[np.int64]
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


class _Torch:
    """The PyTorch side: logits of all heads, and the answer for given thresholds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.exits = len(model.specs) if isinstance(model, MultiExit) else 0

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if isinstance(self.model, MultiExit):
            return self.model.all_logits(*inputs)
        return [self.model(*inputs)]

    @torch.no_grad()
    def answer(
        self, logits: Sequence[Tensor], thresholds: Sequence[float] | None
    ) -> tuple[Arrays, NDArray[np.float32]]:
        """Outputs as the exported graph names them, and the margin of every row."""
        if not isinstance(self.model, MultiExit):
            # in units of a logit, as `MultiExit.margins`: an error of e in every logit moves it by at most e
            top = logits[0].double().topk(min(2, logits[0].shape[1]), dim=1).values
            return {LOGITS: logits[0].numpy()}, ((top[:, 0] - top[:, -1]) / 2).float().numpy()
        values = None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32)
        output = self.model.decide(logits, values)
        arrays = {LABEL: output.label.numpy(), SCORES: output.scores.numpy(), EXIT_INDEX: output.exit_index.numpy()}
        return arrays, self.model.margins(logits, values).numpy()

    def forced(self) -> list[list[float]]:
        """Thresholds that send every row to exit 0, 1, ... K."""
        assert isinstance(self.model, MultiExit)
        never, always = self.model.policy.never, self.model.policy.always
        return [[never] * k + [always] + [never] * (self.exits - k - 1) for k in range(self.exits)] + [
            [never] * self.exits
        ]


class _Check:
    """Compares batches and collects what differs."""

    def __init__(self, abs_tol: float, rel_tol: float, flip_margin: float = 0.0) -> None:
        self.abs_tol, self.rel_tol, self.flip_margin = abs_tol, rel_tol, flip_margin
        self.max_abs = 0.0
        self.elements = self.outside = 0
        self.rows = self.label_flips = self.exit_flips = 0
        self.flips: list[Flip] = []
        self.failures: list[str] = []

    def numbers(self, what: str, got: NDArray[Any], want: NDArray[Any]) -> float:
        if not got.size and got.shape == want.shape:
            return 0.0
        result = compare(got, want, abs_tol=self.abs_tol, rel_tol=self.rel_tol)
        self.elements, self.outside = self.elements + result.elements, self.outside + result.outside
        self.max_abs = max(self.max_abs, result.max_abs)
        if not result.passed:
            self.failures.append(f"{what}: {result.text()}")
        return result.max_abs

    def answers(
        self, what: str, split: str, first: int, got: Arrays, want: Arrays, margin: NDArray[np.float32]
    ) -> None:
        """Labels and exits exactly, numbers on the rows where both are equal."""
        label_got, label_want = label_of(got), label_of(want)
        exits_got = got.get(EXIT_INDEX, np.zeros_like(label_got))
        exits_want = want.get(EXIT_INDEX, np.zeros_like(label_want))
        self.rows += len(label_want)
        same = np.ones(len(label_want), dtype=bool)
        for kind, a, b in (("label", label_want, label_got), ("exit", exits_want, exits_got)):
            for row in np.flatnonzero(a != b).tolist():
                same[row] = False
                self.label_flips += kind == "label"
                self.exit_flips += kind == "exit"
                if margin[row] <= self.flip_margin:
                    self.flips.append(Flip(split, first + row, kind, int(a[row]), int(b[row]), float(margin[row])))
                else:
                    self.failures.append(
                        f"{what}, row {first + row}: {kind} {int(a[row])} in PyTorch, {int(b[row])} in ONNX, "
                        f"margin {margin[row]:.3g} against a possible numeric shift of {self.flip_margin:.3g}"
                    )
        if LOGITS in want:
            self.numbers(f"{what}, {LOGITS}", got[LOGITS], want[LOGITS])
            return
        # a class may be excluded on one side only without a change of label or exit: the same closeness excuses it
        other = exclusion_differs(got[SCORES], want[SCORES]) & same & (margin <= self.flip_margin)
        self.flips += [
            Flip(split, first + r, "excluded", -1, -1, float(margin[r])) for r in np.flatnonzero(other).tolist()
        ]
        same &= ~other
        self.numbers(f"{what}, {SCORES}", got[SCORES][same], want[SCORES][same])

    def beside(self, what: str, split: str, got: Arrays, want: Arrays, margin: NDArray[np.float32]) -> None:
        """`answers` for rows that do not count in the agreement over the split."""
        counts = self.rows, self.label_flips, self.exit_flips
        self.answers(what, split, 0, got, want, margin)
        self.rows, self.label_flips, self.exit_flips = counts


def label_of(outputs: Arrays) -> NDArray[np.int64]:
    """Class of every row, from either kind of output."""
    label: NDArray[np.int64] = outputs[LABEL] if LABEL in outputs else outputs[LOGITS].argmax(axis=1)
    return label


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
    """
    reference = _Torch(model)
    data = source.splits[split]
    chosen = _spread(len(data), rows)
    check = _Check(abs_tol, rel_tol)
    _logits(reference, flat_path, source, data, chosen, check)
    # one thread: what is recorded as reference must be the same bytes each time
    runner = session_on(model_path, threads=1)
    outputs = _natural(reference, runner, source, data, split, chosen, check)
    golden = _golden_natural(reference, source, data, outputs, chosen)
    covered = 1
    if reference.exits:
        covered = _forced(reference, model_path, source, data, split, chosen, check, golden)
    levels = _levels(reference, model_path, source, data, split, chosen, check)
    if not reference.exits:
        _batch_sizes(reference, runner, source, data, split, check)
    report = ParityReport(
        max_abs_diff=check.max_abs,
        fraction_outside=check.outside / max(1, check.elements),
        rows=check.rows,
        label_agreement=1.0 - check.label_flips / max(1, check.rows),
        exit_agreement=1.0 - check.exit_flips / max(1, check.rows),
        exits_covered=covered,
        exits_total=reference.exits + 1,
        excused=tuple(check.flips),
        optimization_levels=levels,
    )
    label = label_of(outputs)
    exit_index = outputs.get(EXIT_INDEX, np.zeros_like(label))
    return ParityResult(report, golden, check.flip_margin, label, exit_index, check.failures)


def _spread(total: int, rows: int | None) -> list[int]:
    if rows is None or rows >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(1, rows - 1)) for i in range(rows)})


def _feeds(source: Source, inputs: Sequence[Tensor]) -> Arrays:
    return {name: x.numpy() for name, x in zip(source.input_names, inputs, strict=True)}


def _thresholds(model: nn.Module) -> list[float] | None:
    return [float(t) for t in model.thresholds] if isinstance(model, MultiExit) else None


def _logits(
    reference: _Torch, flat_path: Path, source: Source, data: SourceSplit, chosen: Sequence[int], check: _Check
) -> None:
    """Holds the logits of every head to the tolerance, on up to 256 rows; their largest error says what may flip."""
    runner = session_on(flat_path, threads=1)
    rows = [chosen[i] for i in _spread(len(chosen), 256)]
    largest = 0.0
    for start in range(0, len(rows), _BATCH):
        inputs = data.batch(rows[start : start + _BATCH]).inputs
        got = runner.run_rows(_feeds(source, inputs))
        for head, want in enumerate(reference.logits(inputs)):
            error = check.numbers(
                f"logits of head {head}, rows from {rows[start]}", got[logits_name(head)], want.numpy()
            )
            largest = max(largest, error)
    # below 1e-6 float32 itself decides, see `MultiExit.margins`
    check.flip_margin = max(2.0 * largest, 1e-6)


def _natural(
    reference: _Torch,
    runner: Runner,
    source: Source,
    data: SourceSplit,
    split: str,
    chosen: Sequence[int],
    check: _Check,
) -> Arrays:
    """Every chosen row with the thresholds that are stored; returns what the file answered."""
    parts: list[Arrays] = []
    for start in range(0, len(chosen), _BATCH):
        indices = chosen[start : start + _BATCH]
        inputs = data.batch(indices).inputs
        got = runner.run_rows(_feeds(source, inputs))
        want, margin = reference.answer(reference.logits(inputs), _thresholds(reference.model))
        check.answers(f"split {split}", split, indices[0], got, want, margin)
        parts.append(got)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _case(
    reference: _Torch, source: Source, inputs: Sequence[Tensor], got: Arrays, thresholds: list[float] | None
) -> GoldenCase:
    want, margin = reference.answer(reference.logits(inputs), thresholds)
    with_exits = thresholds is not None
    return GoldenCase(
        inputs=_feeds(source, inputs),
        torch=want,
        reference=got,
        thresholds=np.asarray(thresholds, np.float32) if with_exits else None,
        margin=margin,
    )


def _golden_natural(
    reference: _Torch, source: Source, data: SourceSplit, outputs: Arrays, chosen: Sequence[int]
) -> list[GoldenCase]:
    """Up to 16 rows spread evenly, so that their mix of exits is the split's; the forced cases cover every exit."""
    picked = _spread(len(chosen), _GOLDEN_ROWS)
    got = {name: value[picked] for name, value in outputs.items()}
    inputs = data.batch([chosen[i] for i in picked]).inputs
    return [_case(reference, source, inputs, got, _thresholds(reference.model))]


def _forced(
    reference: _Torch,
    model_path: Path,
    source: Source,
    data: SourceSplit,
    split: str,
    chosen: Sequence[int],
    check: _Check,
    golden: list[GoldenCase],
) -> int:
    """Sends rows to every exit by moving the thresholds; returns how many exits were reached."""
    rows = [chosen[i] for i in _spread(len(chosen), _FORCED_ROWS)]
    inputs = data.batch(rows).inputs
    logits = reference.logits(inputs)
    covered = 0
    for k, thresholds in enumerate(reference.forced()):
        got = session_on(model_path, threads=1, thresholds=thresholds).run_rows(_feeds(source, inputs))
        want, margin = reference.answer(logits, thresholds)
        check.beside(f"exit {k} forced", split, got, want, margin)
        reached = np.flatnonzero(got[EXIT_INDEX] == k)
        if len(reached) == 0:
            check.failures.append(
                f"exit {k} was not reached by any of {len(rows)} rows although it was forced"
                + (": its best classes tie exactly in PyTorch too, so its head is saturated or constant; train it "
                   "with a lower learning rate, normalise the inputs, or place it deeper"
                   if not (want[EXIT_INDEX] == k).any() else "")
            )  # fmt: skip
            continue
        covered += 1
        few = reached[:_GOLDEN_FORCED_ROWS].tolist()
        case_inputs = [x[few] for x in inputs]
        golden.append(_case(reference, source, case_inputs, {n: v[few] for n, v in got.items()}, thresholds))
    return covered


def _levels(
    reference: _Torch,
    model_path: Path,
    source: Source,
    data: SourceSplit,
    split: str,
    chosen: Sequence[int],
    check: _Check,
) -> dict[str, float]:
    """Largest difference of the numbers at every graph optimization level, every exit forced."""
    inputs = data.batch([chosen[i] for i in _spread(len(chosen), 2)]).inputs
    logits = reference.logits(inputs)
    settings: list[list[float] | None] = list(reference.forced()) if reference.exits else [None]
    found: dict[str, float] = {}
    for level in OPTIMIZATION_LEVELS:
        own = _Check(check.abs_tol, check.rel_tol, check.flip_margin)
        for thresholds in settings:
            runner = session_on(model_path, threads=1, thresholds=thresholds, optimization_level=level)
            want, margin = reference.answer(logits, thresholds)
            own.answers(f"optimization level {level}", split, 0, runner.run_rows(_feeds(source, inputs)), want, margin)
        found[level] = own.max_abs
        check.max_abs = max(check.max_abs, own.max_abs)
        check.failures += own.failures
    return found


def _batch_sizes(
    reference: _Torch, runner: Runner, source: Source, data: SourceSplit, split: str, check: _Check
) -> None:
    """A batch axis that is declared dynamic must take several sizes, one row included."""
    if runner.takes_single_rows:
        return
    for size in (1, 2, 7):
        inputs = data.batch([i % len(data) for i in range(size)]).inputs
        want, margin = reference.answer(reference.logits(inputs), None)
        check.beside(f"batch of {size}", split, runner.run(_feeds(source, inputs)), want, margin)
