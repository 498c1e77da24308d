"""What two runtimes' answers have in common: numbers within a tolerance, decisions exactly.

Float tolerance is one thing, a flipped label or exit another: both are counted. A flip is excused only where its
margin (see `MultiExit.margins`) is within what the measured error of the logits can move; it is listed (DESIGN §4
rule 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.answers.kind import EXIT_DIFFERS, LABEL_DIFFERS
from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Flip
from edgewright.edge_runtime.proof.comparison import compare

Arrays: TypeAlias = dict[str, NDArray[Any]]

SMALLEST_SHIFT = 1e-6
"""Below it float32 itself decides, see `MultiExit.margins`."""


def possible_shifts(errors: Sequence[float]) -> tuple[float, ...]:
    """What the logits of each head may be off by: twice their largest measured error."""
    return tuple(max(2.0 * error, SMALLEST_SHIFT) for error in errors)


class Agreement:
    """Compares batches and collects what differs.

    Args:
        abs_tol: of numbers.
        rel_tol: of numbers.
        specs: what the outputs mean.

    Attributes:
        max_abs: largest difference of two numbers.
        elements: numbers compared.
        outside: of these, beyond the tolerance.
        rows: rows that were compared, those of `beside` left out; so are its flips.
        decided: labels among these rows: one each, or one for each pixel or position.
        label_flips: of them, those that differ.
        exit_flips: rows that differ in exit.
        flips: what was excused.
        failures: what was not.
    """

    def __init__(self, abs_tol: float, rel_tol: float, specs: Sequence[AnswerSpec]) -> None:
        self.abs_tol, self.rel_tol, self.specs = abs_tol, rel_tol, tuple(specs)
        self.max_abs = 0.0
        self.elements = self.outside = 0
        self.rows = self.decided = self.label_flips = self.exit_flips = 0
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
        margin: NDArray[np.float32] | None,
        flip_margin: float,
    ) -> None:
        """Decisions exactly; numbers, where they mean something else after another decision, only on the other rows.

        Args:
            case: how the rows were run, ``""`` for the plain split.
            split: where the rows come from.
            indices: of the rows in the split.
            got: what ONNX Runtime answered, N rows.
            want: what PyTorch answered.
            margin: float32 of the decisions; None: what the outputs tell.
            flip_margin: up to which a flip is excused.
        """
        where = f"split {split}" + (f", {case}" if case else "")
        self.rows += len(indices)
        for spec in self.specs:
            self._answer(spec, where, case, split, indices, got, want, margin, flip_margin)

    def _answer(
        self,
        spec: AnswerSpec,
        where: str,
        case: str,
        split: str,
        indices: Sequence[int],
        got: Arrays,
        want: Arrays,
        margin: NDArray[np.float32] | None,
        flip_margin: float,
    ) -> None:
        kind = kind_of(spec)
        wrong = [name for name in kind.outputs(spec) if got[name].shape != want[name].shape]
        if wrong:
            for name in wrong:
                self.failures.append(f"{where}, {name}: {compare(got[name], want[name]).text()}")
            return
        wanted, found = kind.decisions(spec, want), kind.decisions(spec, got)
        if LABEL_DIFFERS in wanted:
            self.decided += wanted[LABEL_DIFFERS].size
            self.label_flips += int((wanted[LABEL_DIFFERS] != found[LABEL_DIFFERS]).sum())
        if EXIT_DIFFERS in wanted:
            self.exit_flips += int((wanted[EXIT_DIFFERS] != found[EXIT_DIFFERS]).sum())
        same = np.ones(len(indices), dtype=bool)
        answer = spec.name if len(self.specs) > 1 else ""
        for apart in kind.differences(spec, got, want, margin, flip_margin):
            same[apart.row] = same[apart.row] and not kind.numbers_follow
            row, wide = indices[apart.row], math.inf if apart.margin is None else apart.margin
            if apart.excused:
                flip = Flip(split, row, apart.what, apart.expected, apart.got, wide, case, answer, apart.places)
                self.flips.append(flip)
            else:
                many = f", at the widest of {apart.places} places" if apart.places > 1 else ""
                named = f"{where}, row {row}: {f'{answer} ' if answer else ''}"
                self.failures.append(
                    f"{named}{apart.said}"
                    if apart.said
                    else f"{named}{apart.what} {apart.expected} in PyTorch, "
                    f"{apart.got} in ONNX{many}, margin {wide:.3g} against a possible numeric shift of "
                    f"{flip_margin:.3g}"
                )
        for name in kind.numbers(spec):
            self.numbers(f"{where}, {name}", got[name][same], want[name][same])

    def beside(self, other: Agreement) -> None:
        """Takes over what `other` found, except its count of rows: they are no part of the agreement over the split."""
        self.max_abs = max(self.max_abs, other.max_abs)
        self.elements, self.outside = self.elements + other.elements, self.outside + other.outside
        self.flips += other.flips
        self.failures += other.failures

    def fresh(self) -> Agreement:
        """An empty one with the same tolerances."""
        return Agreement(self.abs_tol, self.rel_tol, self.specs)
