"""What the outputs of a model mean: the kinds of answers, each said once, in `KINDS`.

A kind says what a decision is, what margin a decision has, when two answers agree, and what `predict` returns. Export,
parity, golden cases, `verify`, the runner and the command line all ask here, and define none of it themselves. To add a
kind, write a class and put it into the table. NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, EdgewrightError
from ..inference.prediction import ClassMap, Prediction, Result, Tokens, Values
from .manifest import EXIT_INDEX, LABEL, LOGITS, SCORES, AnswerSpec, TensorSpec

CLASSES, EXITS, VALUES, CLASS_MAP, TOKENS = "classes", "exits", "values", "class_map", "tokens"
"""The kinds."""

LABEL_DIFFERS, EXIT_DIFFERS, EXCLUDED_DIFFERS = "label", "exit", "excluded"
"""What `Difference.what` may be; the last: label and exit are equal and another set of classes is excluded."""

Outputs: TypeAlias = Mapping[str, NDArray[Any]]
"""Output name -> array, the rows in axis 0."""


@dataclass(frozen=True)
class Difference:
    """A decision that two answers do not share; of a row with several places (pixels, positions) all of them in one."""

    what: str
    """See `LABEL_DIFFERS`."""
    row: int
    expected: int
    """At the place with the widest margin; -1 for excluded classes."""
    got: int
    margin: float | None
    """The widest of the places that differ; None if no margin is known."""
    excused: bool
    """Whether the margin is no wider than what numeric errors can move."""
    places: int = 1
    """How many places of the row differ."""


@dataclass(frozen=True)
class Meaning:
    """What a result takes from the bundle beside its answer's spec."""

    exits: tuple[str, ...] = ()
    """Names of the exits."""
    excludes: bool = False
    """Whether exits rule classes out."""
    model: str = "the model"
    """Name of the file, for messages."""


class Kind:
    """Base of all kinds: numbers that decide nothing."""

    name: ClassVar[str] = ""
    decides: ClassVar[bool] = False
    """Whether an answer holds decisions."""
    numbers_follow: ClassVar[bool] = False
    """Whether the numbers of a row mean something else once its decision is another, so that they are not compared."""

    def outputs(self, spec: AnswerSpec) -> tuple[str, ...]:
        """The graph's outputs that make up the answer."""
        return (spec.name,)

    def numbers(self, spec: AnswerSpec) -> tuple[str, ...]:
        """Those of them that are compared as numbers."""
        return (spec.name,)

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """What is decided -> int64 [N, ...]; empty if nothing is."""
        del spec, outputs
        return {}

    def margins(self, spec: AnswerSpec, outputs: Outputs) -> NDArray[np.float32] | None:
        """Shape of the decisions: every output may move by less than this, and the decision stays.

        None where nothing is decided, or where the outputs do not tell.
        """
        del spec, outputs
        return None

    def differences(
        self, spec: AnswerSpec, got: Outputs, want: Outputs, margin: NDArray[Any] | None, flip_margin: float
    ) -> list[Difference]:
        """The decisions of `got` that are not those of `want`.

        Args:
            spec: of the answer.
            got: outputs, N rows.
            want: the same, of equal shapes.
            margin: of the decisions of `want`, [N] or like them; None: what the outputs tell.
            flip_margin: up to which a difference is excused.
        """
        if margin is None:
            margin = self.margins(spec, want)
        other = self.decisions(spec, got)
        return [
            difference
            for what, wanted in self.decisions(spec, want).items()
            for difference in _apart(what, wanted, other[what], margin, flip_margin)
        ]

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Result:
        """What `Runner.predict` returns.

        Args:
            spec: of the answer.
            outputs: N rows, may be views of the runtime's memory.
            refused: rows whose input has no answer, with the reason.
            meaning: what else the bundle says.

        Raises:
            EdgewrightError: no row is finite.
        """
        raise NotImplementedError

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """Why the graph's outputs cannot be such an answer; None if they can. All of `outputs` are in `tensors`."""
        tensor = tensors[spec.name]
        if np.dtype(tensor.dtype).kind != "f":
            return f"the output {spec.name!r} has the dtype {tensor.dtype}, and {self.name} are float"
        return None


class _ArgMax(Kind):
    """Logits, the largest of which along an axis is the decision."""

    decides = True
    axis: ClassVar[int] = -1
    axes: ClassVar[tuple[int, ...]] = ()
    """Numbers of axes that are possible, all if empty."""
    form: ClassVar[str] = ""

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """The place of the largest logit."""
        return {LABEL_DIFFERS: np.asarray(outputs[spec.name].argmax(axis=self.axis), np.int64)}

    def margins(self, spec: AnswerSpec, outputs: Outputs) -> NDArray[np.float32] | None:
        """Half of what the largest logit is ahead: two logits that move by less cannot change places."""
        logits = outputs[spec.name]
        classes = logits.shape[self.axis]
        top = np.partition(logits, [max(0, classes - 2), classes - 1], axis=self.axis)
        first, second = (np.take(top, at, axis=self.axis).astype(np.float64) for at in (-1, max(0, classes - 2)))
        return np.asarray((first - second) / 2, np.float32)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """Wrong number of axes, or as many names as there are no classes."""
        tensor = tensors[spec.name]
        if self.axes and len(tensor.shape) not in self.axes:
            return f"the output {spec.name!r} has the shape {list(tensor.shape)}, and {self.name} are {self.form}"
        return _mismatch(spec, tensor, self.axis) or super().unfit(spec, tensors)


class Classes(_ArgMax):
    """One class for each row: logits [N, C]."""

    name = CLASSES
    form = "logits [N, C]"

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Prediction:
        """Label and probabilities."""
        scores = softmax(outputs[spec.name])
        label = np.asarray(scores.argmax(axis=-1), np.int64)
        return _prediction(spec, label, scores, np.zeros(label.shape, np.int64), refused, meaning)


class Exits(Kind):
    """One class for each row, from the exit that it took: label [N], scores [N, C], exit_index [N]."""

    name = EXITS
    decides = True
    numbers_follow = True

    def outputs(self, spec: AnswerSpec) -> tuple[str, ...]:
        """Three."""
        del spec
        return LABEL, SCORES, EXIT_INDEX

    def numbers(self, spec: AnswerSpec) -> tuple[str, ...]:
        """The scores."""
        del spec
        return (SCORES,)

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """Label and exit."""
        del spec
        return {LABEL_DIFFERS: outputs[LABEL], EXIT_DIFFERS: outputs[EXIT_INDEX]}

    def differences(
        self, spec: AnswerSpec, got: Outputs, want: Outputs, margin: NDArray[Any] | None, flip_margin: float
    ) -> list[Difference]:
        """Also rows in which only the set of excluded classes differs, if they are excused: else the scores tell."""
        found = super().differences(spec, got, want, margin, flip_margin)
        if margin is None or got[SCORES].ndim != 2:
            return found
        apart = {difference.row for difference in found}
        close = np.asarray(margin).ravel()
        for row in np.flatnonzero(exclusion_differs(got[SCORES], want[SCORES])).tolist():
            if row not in apart and row < close.size and close[row] <= flip_margin:
                found.append(Difference(EXCLUDED_DIFFERS, row, -1, -1, float(close[row]), True))
        return found

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Prediction:
        """Label, scores and exit."""
        return _prediction(spec, outputs[LABEL], outputs[SCORES], outputs[EXIT_INDEX], refused, meaning)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """As many names as there are no classes."""
        return _mismatch(spec, tensors[SCORES], -1)


class ValuesKind(Kind):
    """Numbers: any float tensor [N, ...]."""

    name = VALUES

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Values:
        """The numbers in the unit of the data."""
        values = outputs[spec.name]
        for numbers, apply in ((spec.scale, np.multiply), (spec.offset, np.add)):
            if numbers:
                values = apply(values, _by_column(numbers, values)).astype(values.dtype)
        refused = _with_overflown(values, refused, meaning)
        return Values(_blanked(values, refused, np.nan), spec.unit, spec.labels, refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """A number of factors or names that is not that of the columns; factors that lose the values."""
        tensor = tensors[spec.name]
        for field, numbers in (("scale", spec.scale), ("offset", spec.offset)):
            columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
            if len(numbers) > 1 and isinstance(columns, int) and len(numbers) != columns:
                return f"{field} has {len(numbers)} numbers for the {columns} columns of {spec.name!r}"
            if not np.isfinite(numbers).all() or (field == "scale" and 0 in numbers):
                return f"{field} of {spec.name!r} is {list(numbers)}, which no value comes back from"
        return (_mismatch(spec, tensor, 1) if len(tensor.shape) > 1 else None) or super().unfit(spec, tensors)


class ClassMapKind(_ArgMax):
    """One class for each pixel: logits [N, C, H, W]."""

    name = CLASS_MAP
    axis = 1
    axes = (4,)
    form = "logits [N, C, H, W]"

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> ClassMap:
        """Label and probability of every pixel."""
        logits = outputs[spec.name].astype(np.float32, copy=False)
        refused = _with_overflown(logits, refused, meaning)
        top = logits.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            probability = np.asarray(1.0 / np.exp(logits - top).sum(axis=1), np.float32)
        label = np.asarray(logits.argmax(axis=1), np.int64)
        return ClassMap(_blanked(label, refused, -1), _blanked(probability, refused, np.nan), spec.labels, refused)


class TokensKind(_ArgMax):
    """The token that follows at each position: logits [N, T, V]."""

    name = TOKENS
    axes = (3,)
    form = "logits [N, T, V]"

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Tokens:
        """The likeliest token and its logits."""
        logits = outputs[spec.name]
        refused = _with_overflown(logits, refused, meaning)
        token = np.asarray(logits.argmax(axis=-1), np.int64)
        return Tokens(_blanked(token, refused, -1), _blanked(logits, refused, np.nan), refused)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classes(), Exits(), ValuesKind(), ClassMapKind(), TokensKind())}
"""Every kind by name."""


def kind_of(spec: AnswerSpec) -> Kind:
    """The kind of an answer.

    Raises:
        BundleError: there is none of that name; says which there are.
    """
    if spec.kind not in KINDS:
        raise BundleError(
            f"the answer {spec.name!r} has the kind {spec.kind!r}, and this runtime knows {', '.join(KINDS)}: use the "
            "edge_runtime.pyz that lies in the bundle, or a newer edgewright"
        )
    return KINDS[spec.kind]


def exits_answer(labels: Sequence[str]) -> AnswerSpec:
    """The answer of a network with exits."""
    return AnswerSpec(LABEL, EXITS, tuple(labels))


def answers_by_names(
    outputs: Mapping[str, int], labels: Sequence[str] | None, *, exits: bool, tokens: bool
) -> tuple[AnswerSpec, ...]:
    """What outputs mean that nobody has declared, as of the first bundles.

    Args:
        outputs: name -> number of axes.
        labels: names of the classes; empty: there are no classes; None: nobody knows.
        exits: whether the network has exits.
        tokens: whether outputs [N, T, V] of a task without classes are logits of tokens.

    Returns:
        The answers; none where the names are not known either.
    """
    if exits:
        return (exits_answer(labels or ()),)
    if labels is None or labels:
        return (AnswerSpec(LOGITS, CLASSES, tuple(labels or ())),) if LOGITS in outputs else ()
    return tuple(AnswerSpec(name, TOKENS if tokens and axes == 3 else VALUES) for name, axes in outputs.items())


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities along the last axis, float32; NaN stays NaN."""
    # the ufuncs themselves: for a row of classes numpy's methods take longer than the arithmetic
    values = logits.astype(np.float32, copy=False)
    exponentials = np.exp(values - np.maximum.reduce(values, axis=-1, keepdims=True))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return np.asarray(exponentials, np.float32)


def exclusion_differs(got: NDArray[Any], want: NDArray[Any]) -> NDArray[np.bool_]:
    """Rows in which another set of classes is excluded, which is where a score is exactly 0.

    Rows with NaN or infinity on either side are not among them: no excluded class explains those.

    Args:
        got: scores, float [N, C].
        want: scores, float [N, C].

    Returns:
        bool [N].
    """
    finite = np.isfinite(got).all(axis=1) & np.isfinite(want).all(axis=1)
    differs: NDArray[np.bool_] = ((got == 0) != (want == 0)).any(axis=1) & finite
    return differs


def _apart(
    what: str, want: NDArray[np.int64], got: NDArray[np.int64], margin: NDArray[Any] | None, flip_margin: float
) -> list[Difference]:
    """One `Difference` for each row that has any."""
    want, got = want.reshape(len(want), -1), got.reshape(len(got), -1)
    known = None if margin is None else np.asarray(margin).reshape(len(margin), -1)
    if known is not None and len(known) != len(want):
        known = None  # of a damaged bundle: nothing is excused
    found = []
    for row in np.flatnonzero((want != got).any(axis=1)).tolist():
        places = np.flatnonzero(want[row] != got[row])
        widest, at = None, int(places[0])
        if known is not None:
            here = known[row][places] if known.shape[1] == want.shape[1] else known[row][:1]
            widest, at = float(here.max()), int(places[int(here.argmax()) if len(here) > 1 else 0])
        excused = widest is not None and widest <= flip_margin
        found.append(Difference(what, row, int(want[row, at]), int(got[row, at]), widest, excused, len(places)))
    return found


def _prediction(
    spec: AnswerSpec,
    label: NDArray[np.int64],
    scores: NDArray[np.float32],
    exit_index: NDArray[np.int64],
    refused: dict[int, str],
    meaning: Meaning,
) -> Prediction:
    if refused or not _is_finite(scores):
        refused = _with_overflown(scores, refused, meaning)
        label, exit_index = _blanked(label, refused, -1), _blanked(exit_index, refused, -1)
        scores = _blanked(scores, refused, np.nan)
    return Prediction(label, scores, exit_index, spec.labels, meaning.exits, meaning.excludes, refused)


def _is_finite(values: NDArray[Any]) -> bool:
    # for small arrays `all` takes longer than all the rest
    return b"\0" not in np.isfinite(values).tobytes()


def _with_overflown(values: NDArray[Any], refused: dict[int, str], meaning: Meaning) -> dict[int, str]:
    """`refused` and the rows without finite outputs although their input is finite.

    Raises:
        EdgewrightError: every row is like that.
    """
    if _is_finite(values):
        return refused
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).tolist()
    text = f"{meaning.model} gave outputs that are not finite for a finite input: it overflows, `verify` shows where"
    if len(bad) == len(values):
        raise EdgewrightError(text)
    return {**dict.fromkeys(bad, text), **refused}


def _blanked(values: NDArray[Any], rows: Mapping[int, str], blank: float) -> NDArray[Any]:
    """`values` with `blank` in the rows that have no answer."""
    if rows:
        values = values.copy()
        values[list(rows)] = blank
    return values


def _by_column(numbers: Sequence[float], values: NDArray[Any]) -> NDArray[np.float64]:
    column = np.asarray(numbers, np.float64)
    return column.reshape(1, -1, *(1,) * (values.ndim - 2)) if values.ndim > 1 else column


def _mismatch(spec: AnswerSpec, tensor: TensorSpec, axis: int) -> str | None:
    """Why the names cannot be those of what lies along `axis`."""
    if not spec.labels or not tensor.shape:
        return None
    width = tensor.shape[axis]
    if not isinstance(width, int) or width == len(spec.labels):
        return None
    return (
        f"labels has {len(spec.labels)} names and the output {tensor.name!r} is {width} wide "
        f"(shape {list(tensor.shape)}), so names and classes cannot be matched"
    )
