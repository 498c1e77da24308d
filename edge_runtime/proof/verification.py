"""Verifying a bundle on the machine it will run on: every recorded case, every exit, against two references.

`reference` is what this very file gave on the exporting machine's CPU, `torch` what the compressed PyTorch
model gave. Numbers are held to the manifest's tolerances. Labels, exits and the sets of excluded classes must
be equal; a row whose decision lay closer to its threshold than the numeric error measured at export may differ,
and is listed; its scores are not compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..answers.kind import EXCLUDED_DIFFERS, EXIT_DIFFERS, LABEL_DIFFERS, Difference
from ..answers.table import kind_of
from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import EXIT_INDEX, LABEL, AnswerSpec, GoldenCase, Manifest, Tolerances
from ..errors import InputError, ParityError
from ..inference.options import SessionKeywords, SessionOptions
from ..inference.providers import Placement
from ..inference.session import load
from ..process.plain_text import printable
from .comparison import Comparison, compare

if TYPE_CHECKING:
    from typing_extensions import Unpack

EXCLUDED = EXCLUDED_DIFFERS
"""`ExcusedFlip.output` where only the set of excluded classes differs."""

_OUTPUTS = {LABEL_DIFFERS: LABEL, EXIT_DIFFERS: EXIT_INDEX}

_MOST_LINES = 12


@dataclass(frozen=True)
class Finding:
    """One way in which the bundle failed; `case` -1 stands for all cases together."""

    case: int
    against: str
    """``"reference"``, ``"torch"`` or ``"bundle"``."""
    output: str
    row: int | None
    message: str

    def text(self) -> str:
        """One line: which case, output and row, and how far."""
        place = f"case {self.case:04d}, " if self.case >= 0 else ""
        row = f", row {self.row}" if self.row is not None else ""
        output = f", output {self.output!r}" if self.output else ""
        return f"{place}against {self.against}{output}{row}: {self.message}"


@dataclass(frozen=True)
class ExcusedFlip:
    """A decision that differs on a row whose margin is within the numeric error of the export."""

    case: int
    against: str
    output: str
    """name of the answer; with exits ``"label"``, ``"exit_index"``, or ``"excluded"``: label and exit are equal and
    only the set of excluded classes differs."""
    row: int
    expected: int
    """label or exit; -1 for ``"excluded"``."""
    got: int
    """label or exit; -1 for ``"excluded"``."""
    margin: float
    """of several places of a row, such as pixels, the widest."""
    places: int = 1
    """how many places of the row differ."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `passed` is the verdict."""

    bundle: str
    bundle_sha256: str
    name: str
    onnxruntime: str
    placement: Placement
    threads: int | None
    optimization_level: str
    layout: str
    tolerances: Tolerances
    cases: int
    rows: int
    max_abs_diff: Mapping[str, float]
    """against ``reference`` and ``torch``, over all float outputs."""
    fraction_outside: Mapping[str, float]
    label_agreement: float | None
    """share of rows (of pixels in a class map, of positions where tokens follow) equal in label, excused flips counted
    as different; None: nothing is decided."""
    exit_agreement: float | None
    exits_covered: int
    exits_total: int
    findings: tuple[Finding, ...]
    excused: tuple[ExcusedFlip, ...]
    allowed: tuple[str, ...] = ()
    """where the tolerances of the manifest allow everything, so that nothing was proven there; a sentence each."""
    schema_version: int = 1

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def raise_if_failed(self) -> None:
        """Turns the findings into an exception.

        Raises:
            ParityError: there are findings; the text is the report.
        """
        if self.findings:
            raise ParityError(self.text())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {**asdict(self), "passed": self.passed}

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=2, allow_nan=False) + "\n"

    def text(self) -> str:
        """The report on one screen."""
        agreement = [
            f"{what} {value:.2%}"
            for what, value in (("labels", self.label_agreement), ("exits", self.exit_agreement))
            if value is not None
        ]
        lines = [
            printable(f"{self.name}: {'verified' if self.passed else 'FAILED'}   {self.bundle}"),
            f"  onnxruntime {self.onnxruntime}, {self.placement.text()}, optimization {self.optimization_level}"
            + (", split" if self.layout == "split" else ""),
            *(f"  FALLBACK: {reason}" for reason in self.placement.fallback),
            f"  {self.cases} cases, {self.rows} rows, exits covered {self.exits_covered} of {self.exits_total}",
        ]
        lines.append(f"  tolerances: {_tolerances_text(self.tolerances)}")
        lines += [f"  CAUTION: {what}" for what in self.allowed]
        for against, largest in self.max_abs_diff.items():
            share = self.fraction_outside[against]
            lines.append(f"  against {against}: max |diff| {largest:.3g}, {share:.2%} of values outside")
        if agreement:
            lines.append("  equal to every reference: " + ", ".join(agreement))
        lines += _shortened([printable(f"  excused: {_excuse(flip)}") for flip in self.excused], "excused flips")
        lines += _shortened([printable(f"  FAILED: {finding.text()}") for finding in self.findings], "failures")
        if self.findings:
            lines.append("  Do not use it here: try another provider or optimization level, or export again.")
        return "\n".join(lines)


def verify(
    bundle: str | os.PathLike[str] | Bundle, options: SessionOptions | None = None, **given: Unpack[SessionKeywords]
) -> VerifyReport:
    """Runs every golden case of a bundle and compares.

    Args:
        bundle: folder, zip or open `Bundle`.
        options: as in `load`. With thresholds or an operating point the cases alone are run that were recorded with
            these; for both layouts, what was recorded is what `model.onnx` answered.
        given: as in `load`.

    Returns:
        The report; call `raise_if_failed` for the exception.

    Raises:
        BundleError: the bundle is not intact.
        InputError: an option that does not fit, or thresholds with which nothing was recorded.
        ProviderError: see `load`.
    """
    options = SessionOptions.of(options, given)
    if not isinstance(bundle, Bundle):
        with open_bundle(bundle) as opened:
            return verify(opened, options)
    cases = bundle.golden()
    check = _Check(bundle.manifest)
    placement = None
    groups = list(_by_thresholds(cases))
    chosen = options.on(bundle.manifest).thresholds
    if chosen is not None:
        groups = _recorded_with(groups, chosen, bundle.manifest)
    for values, indices in groups:
        with load(bundle, options.replaced(thresholds=values, operating_point=None)) as runner:
            placement = runner.placement
            for index in indices:
                got = runner.run_rows(cases[index].inputs)
                runner.require_known(list(got.values()))
                check.case(index, cases[index], got)
    assert placement is not None  # golden.npz with no case does not load
    if chosen is None:
        check.coverage()
    import onnxruntime

    return VerifyReport(
        bundle=str(bundle.source),
        bundle_sha256=bundle.sha256,
        name=bundle.manifest.name,
        onnxruntime=str(onnxruntime.__version__),
        placement=placement,
        threads=options.threads,
        optimization_level=options.optimization_level,
        layout=options.layout,
        tolerances=bundle.manifest.tolerances,
        cases=sum(len(indices) for _, indices in groups),
        rows=check.rows,
        max_abs_diff=check.max_abs,
        fraction_outside={k: check.outside[k] / max(n, 1) for k, n in check.elements.items()},
        label_agreement=check.agreement(LABEL_DIFFERS),
        exit_agreement=check.agreement(EXIT_DIFFERS),
        exits_covered=len(check.exits_seen & set(check.exits_wanted)),
        exits_total=len(check.exits_wanted),
        findings=tuple(check.findings),
        excused=tuple(check.excused),
        allowed=tuple(check.allowed()),
    )


class _Check:
    """Collects what the cases show."""

    def __init__(self, manifest: Manifest) -> None:
        self.tolerances = manifest.tolerances
        self.answers = manifest.answers
        self.exits_wanted = [exit_.index for exit_ in manifest.exits] if manifest.policy is not None else []
        self.rows = 0
        self.findings: list[Finding] = []
        self.excused: list[ExcusedFlip] = []
        self.exits_seen: set[int] = set()
        self.max_abs: dict[str, float] = {}
        self.outside: dict[str, int] = {}
        self.elements: dict[str, int] = {}
        self._binding: dict[tuple[str, str], bool] = {}
        self._largest_margin = -1.0
        self._compared = {LABEL_DIFFERS: 0, EXIT_DIFFERS: 0}
        self._equal = {LABEL_DIFFERS: 0, EXIT_DIFFERS: 0}

    def case(self, index: int, case: GoldenCase, got: Mapping[str, NDArray[Any]]) -> None:
        """Compares one case with everything that was recorded for it."""
        self.rows += int(next(iter(got.values())).shape[0])
        if case.margin is not None and case.margin.size:
            self._largest_margin = max(self._largest_margin, float(np.max(case.margin)))
        if EXIT_INDEX in got:
            self.exits_seen.update(got[EXIT_INDEX].ravel().tolist())
        budgets = (
            ("reference", case.reference, self.tolerances.reference_abs, self.tolerances.reference_rel),
            ("torch", case.torch, self.tolerances.torch_abs, self.tolerances.torch_rel),
        )
        for against, expected, abs_tol, rel_tol in budgets:
            if not expected:
                self._find(index, against, "", None, "nothing was recorded; export the bundle again")
            for name in sorted(set(got) ^ set(expected)) if expected else ():
                what = "is not among the recorded ones" if name in got else "is missing from the model"
                self._find(index, against, name, None, f"the output {what}")
            for spec in self.answers:
                self._answer(index, against, spec, case, expected, got, (abs_tol, rel_tol))
            meant = {name for spec in self.answers for name in kind_of(spec).outputs(spec)}
            for name in sorted((set(got) & set(expected)) - meant):  # a generator's cache
                self._numbers(index, against, name, got[name], expected[name], set(), abs_tol, rel_tol)

    def coverage(self) -> None:
        """Every exit must have been taken by some case."""
        for exit_index in self.exits_wanted:
            if exit_index not in self.exits_seen:
                message = f"no case leaves by exit {exit_index}, so its branch is unproven"
                self._find(-1, "bundle", EXIT_INDEX, None, message)

    def agreement(self, what: str) -> float | None:
        """Share of compared decisions that were equal; None if there was none."""
        return self._equal[what] / self._compared[what] if self._compared[what] else None

    def allowed(self) -> Iterator[str]:
        """Where nothing that was compared could have failed."""
        for (against, output), binding in self._binding.items():
            if not binding:
                yield (
                    f"the tolerance against {against} allows everything for {output!r}: zeros in place of the recorded "
                    "values would pass"
                )
        if 0 <= self._largest_margin <= self.tolerances.flip_margin:
            yield (
                f"flips are excused up to a margin of {self.tolerances.flip_margin:.3g}, and no recorded row has a "
                "larger one: every label and exit would pass"
            )

    def _answer(
        self,
        index: int,
        against: str,
        spec: AnswerSpec,
        case: GoldenCase,
        expected: Mapping[str, NDArray[Any]],
        got: Mapping[str, NDArray[Any]],
        tolerance: tuple[float, float],
    ) -> None:
        """Compares the decisions of one answer, then its numbers, but not those of rows that were decided otherwise."""
        kind = kind_of(spec)
        names = [name for name in kind.outputs(spec) if name in got and name in expected]
        wrong = {name: error for name in names if (error := compare(got[name], expected[name]).error)}
        numbers = [name for name in kind.numbers(spec) if name in names]
        for name, error in wrong.items():
            if name not in numbers:  # of those the comparison says it
                self._find(index, against, name, None, error)
        apart: set[int] = set()
        if len(names) == len(kind.outputs(spec)) and not wrong:
            apart = self._decisions(index, against, spec, case, expected, got)
        for name in numbers:
            self._numbers(index, against, name, got[name], expected[name], apart, *tolerance)

    def _decisions(
        self,
        index: int,
        against: str,
        spec: AnswerSpec,
        case: GoldenCase,
        expected: Mapping[str, NDArray[Any]],
        got: Mapping[str, NDArray[Any]],
    ) -> set[int]:
        """Compares what was decided; returns the rows whose numbers therefore mean something else."""
        kind = kind_of(spec)
        wanted, found = kind.decisions(spec, expected), kind.decisions(spec, got)
        for what, values in wanted.items():
            self._compared[what] += values.size
            self._equal[what] += int((values == found[what]).sum())
        apart: set[int] = set()
        margin = case.margin if len(self.answers) == 1 else None
        for difference in kind.differences(spec, got, expected, margin, self.tolerances.flip_margin):
            output = _OUTPUTS.get(difference.what, difference.what) if kind.numbers_follow else spec.name
            if difference.excused:
                assert difference.margin is not None
                self.excused.append(
                    ExcusedFlip(
                        index,
                        against,
                        output,
                        difference.row,
                        difference.expected,
                        difference.got,
                        difference.margin,
                        difference.places,
                    )
                )
            else:
                self._find(index, against, output, difference.row, _flip_text(difference, self.tolerances))
            if kind.numbers_follow:
                apart.add(difference.row)
        return apart

    def _numbers(
        self,
        index: int,
        against: str,
        name: str,
        got: NDArray[Any],
        want: NDArray[Any],
        apart: set[int],
        abs_tol: float,
        rel_tol: float,
    ) -> None:
        rows = np.arange(len(got))
        if apart and got.shape == want.shape:
            # NaN is never explained by a decision, so such a row is compared whatever was excused
            sound = np.isfinite(np.stack([got, want], axis=1).reshape(len(got), -1)).all(axis=1)
            rows = np.array([row for row in rows.tolist() if row not in apart or not sound[row]], np.int64)
            got, want = got[rows], want[rows]
            if rows.size == 0:
                return
        size = np.abs(want[np.isfinite(want) & (want != 0)].astype(np.float64))
        if size.size:
            with np.errstate(over="ignore"):
                binds = bool((abs_tol + rel_tol * size < size).any())
            self._binding[against, name] = self._binding.get((against, name), False) or binds
        result: Comparison = compare(got, want, abs_tol=abs_tol, rel_tol=rel_tol)
        self.max_abs[against] = max(self.max_abs.get(against, 0.0), result.max_abs)
        self.outside[against] = self.outside.get(against, 0) + result.outside
        self.elements[against] = self.elements.get(against, 0) + result.elements
        if not result.passed:
            row = int(rows[result.worst_index[0]]) if result.worst_index else None
            budget = f" (tolerance {abs_tol:g} + {rel_tol:g} * |wanted|)"
            self._find(index, against, name, row, result.text() + budget)

    def _find(self, case: int, against: str, output: str, row: int | None, message: str) -> None:
        self.findings.append(Finding(case, against, output, row, message))


def _by_thresholds(cases: Sequence[GoldenCase]) -> Iterator[tuple[list[float] | None, list[int]]]:
    """Groups case indices by their thresholds, so that each setting needs one session."""
    groups: dict[tuple[float, ...] | None, list[int]] = {}
    for index, case in enumerate(cases):
        key = None if case.thresholds is None else tuple(np.asarray(case.thresholds).ravel().tolist())
        groups.setdefault(key, []).append(index)
    for key, indices in groups.items():
        yield (None if key is None else list(key)), indices


def _recorded_with(
    groups: Sequence[tuple[list[float] | None, list[int]]], chosen: Sequence[float], manifest: Manifest
) -> list[tuple[list[float] | None, list[int]]]:
    """The groups with these thresholds.

    Raises:
        InputError: there is none; names the operating points that were recorded.
    """
    found = [group for group in groups if group[0] is not None and _same(group[0], chosen)]
    if not found:
        known = [values for values, _ in groups if values is not None]
        names = (
            ", ".join(p.name for p in manifest.operating_points if any(_same(p.thresholds, v) for v in known)) or "none"
        )
        raise InputError(
            f"nothing was recorded with the thresholds {[round(float(t), 6) for t in chosen]}, so there is nothing to "
            f"compare with: verify an operating point ({names}), or leave them out, which runs every recorded case"
        )
    return found


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def _tolerances_text(tolerances: Tolerances) -> str:
    return (
        f"reference {tolerances.reference_abs:g} + {tolerances.reference_rel:g} * |wanted|, "
        f"torch {tolerances.torch_abs:g} + {tolerances.torch_rel:g} * |wanted|, "
        f"flips up to a margin of {tolerances.flip_margin:.3g}"
    )


def _flip_text(difference: Difference, tolerances: Tolerances) -> str:
    if difference.said:
        return difference.said
    known = "no margin was recorded" if difference.margin is None else f"margin {difference.margin:.3g}"
    return (
        f"{difference.got}, wanted {difference.expected}{_places(difference.places)} ({known}, flips are excused up to "
        f"{tolerances.flip_margin:.3g})"
    )


def _excuse(flip: ExcusedFlip) -> str:
    if flip.output == EXCLUDED:
        what = f"row {flip.row} excludes other classes, label and exit are equal"
        return f"case {flip.case:04d}, against {flip.against}, {what}, margin {flip.margin:.3g}"
    return (
        f"case {flip.case:04d}, against {flip.against}, {flip.output} of row {flip.row}: {flip.got}, "
        f"wanted {flip.expected}{_places(flip.places)}, margin {flip.margin:.3g}"
    )


def _places(count: int) -> str:
    return f" at one of {count} places that differ" if count > 1 else ""


def _shortened(lines: list[str], what: str) -> list[str]:
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[:_MOST_LINES], f"  ... and {len(lines) - _MOST_LINES} more {what}"]
