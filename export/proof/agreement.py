"""What two runtimes' answers have in common: numbers within a tolerance, decisions exactly.

Float tolerance is one thing, a flipped label or exit another: both are counted. A flip is excused only where its
margin (see `MultiExit.margins`) is within what the measured error of the logits can move; it is listed (DESIGN §4
rule 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, LABEL, LOGITS, SCORES, Flip
from edgewright.edge_runtime.proof.comparison import compare, exclusion_differs

Arrays: TypeAlias = dict[str, NDArray[Any]]

SMALLEST_SHIFT = 1e-6
"""Below it float32 itself decides, see `MultiExit.margins`."""


def possible_shifts(errors: Sequence[float]) -> tuple[float, ...]:
    """What the logits of each head may be off by: twice their largest measured error."""
    return tuple(max(2.0 * error, SMALLEST_SHIFT) for error in errors)


def label_of(outputs: Arrays) -> NDArray[np.int64]:
    """Class of every row, from either kind of output."""
    label: NDArray[np.int64] = outputs[LABEL] if LABEL in outputs else outputs[LOGITS].argmax(axis=-1)
    return label


class Agreement:
    """Compares batches and collects what differs.

    Args:
        abs_tol: of numbers.
        rel_tol: of numbers.
        decides: whether the largest output is a decision; without classes numbers are compared alone.

    Attributes:
        max_abs: largest difference of two numbers.
        elements: numbers compared.
        outside: of these, beyond the tolerance.
        rows: rows that were compared, those of `beside` left out; so are its flips.
        label_flips: rows that differ in label.
        exit_flips: rows that differ in exit.
        flips: what was excused.
        failures: what was not.
    """

    def __init__(self, abs_tol: float, rel_tol: float, decides: bool = True) -> None:
        self.abs_tol, self.rel_tol, self.decides = abs_tol, rel_tol, decides
        self.max_abs = 0.0
        self.elements = self.outside = 0
        self.rows = self.label_flips = self.exit_flips = 0
        self.flips: list[Flip] = []
        self.failures: list[str] = []

    def numbers(self, what: str, got: NDArray[Any], want: NDArray[Any]) -> float:
        """Holds numbers to the tolerance; returns their largest difference."""
        if not got.size and got.shape == want.shape:
            return 0.0
        result = compare(got, want, abs_tol=self.abs_tol, rel_tol=self.rel_tol)
        self.elements, self.outside = self.elements + result.elements, self.outside + result.outside
        self.max_abs = max(self.max_abs, result.max_abs)
        if not result.passed:
            self.failures.append(f"{what}: {result.text()}")
        return result.max_abs

    def answers(
        self,
        case: str,
        split: str,
        indices: Sequence[int],
        got: Arrays,
        want: Arrays,
        margin: NDArray[np.float32],
        flip_margin: float,
    ) -> None:
        """Labels and exits exactly, numbers on the rows where both are equal.

        Args:
            case: how the rows were run, ``""`` for the plain split.
            split: where the rows come from.
            indices: of the rows in the split.
            got: what ONNX Runtime answered, N rows.
            want: what PyTorch answered.
            margin: float32, one per label.
            flip_margin: up to which a flip is excused.
        """
        where = f"split {split}" + (f", {case}" if case else "")
        self.rows += len(indices)
        if not self.decides:
            self.numbers(f"{where}, {LOGITS}", got[LOGITS], want[LOGITS])
            return
        label_got, label_want = label_of(got), label_of(want)
        exits_got = got.get(EXIT_INDEX, np.zeros_like(label_got))
        exits_want = want.get(EXIT_INDEX, np.zeros_like(label_want))
        same = np.ones(len(label_want), dtype=bool)
        for kind, a, b in (("label", label_want, label_got), ("exit", exits_want, exits_got)):
            for i in np.flatnonzero(a != b).tolist():
                same[i] = False
                self.label_flips += kind == "label"
                self.exit_flips += kind == "exit"
                if margin[i] <= flip_margin:
                    self.flips.append(Flip(split, indices[i], kind, int(a[i]), int(b[i]), float(margin[i]), case))
                else:
                    self.failures.append(
                        f"{where}, row {indices[i]}: {kind} {int(a[i])} in PyTorch, {int(b[i])} in ONNX, "
                        f"margin {margin[i]:.3g} against a possible numeric shift of {flip_margin:.3g}"
                    )
        if LOGITS in want:
            self.numbers(f"{where}, {LOGITS}", got[LOGITS], want[LOGITS])
            return
        # a class may be excluded on one side only without a change of label or exit: the same closeness excuses it
        other = exclusion_differs(got[SCORES], want[SCORES]) & same & (margin <= flip_margin)
        self.flips += [
            Flip(split, indices[i], "excluded", -1, -1, float(margin[i]), case) for i in np.flatnonzero(other).tolist()
        ]
        same &= ~other
        self.numbers(f"{where}, {SCORES}", got[SCORES][same], want[SCORES][same])

    def beside(self, other: Agreement) -> None:
        """Takes over what `other` found, except its count of rows: they are no part of the agreement over the split."""
        self.max_abs = max(self.max_abs, other.max_abs)
        self.elements, self.outside = self.elements + other.elements, self.outside + other.outside
        self.flips += other.flips
        self.failures += other.failures

    def fresh(self) -> Agreement:
        """An empty one with the same tolerances."""
        return Agreement(self.abs_tol, self.rel_tol, self.decides)
