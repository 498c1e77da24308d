"""What a kind of answer is, and what kinds have in common.

A kind says what a decision is, what margin a decision has, when two answers agree, and what `predict` returns. Export,
parity, golden cases, `verify`, the runner and the command line all ask here, and define none of it themselves. To add a
kind, write a file beside this one with a `Kind` and the type of its result, and put it into `table.KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, TensorSpec
from ..errors import EdgewrightError

LABEL_DIFFERS, EXIT_DIFFERS, EXCLUDED_DIFFERS = "label", "exit", "excluded"
"""What `Difference.what` may be; the last: label and exit are equal and another set of classes is excluded."""

Outputs: TypeAlias = Mapping[str, NDArray[Any]]
"""Output name -> array, the rows in axis 0."""


class Result(Protocol):
    """What `predict` returns of one answer for N rows; each kind has a type of its own."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Row -> why it has no answer; such a row changes nothing in the others."""
        ...

    @property
    def rows(self) -> int:
        """N."""
        ...

    def text(self, row: int) -> str:
        """One line for people; `row` has an answer."""
        ...

    def data(self) -> dict[str, Any]:
        """Plain data for a JSON file, `refused` left out."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A result that says where in a picture something is."""

    def placed(self, height: int, width: int) -> Result:
        """The same in pixels of pictures of this size."""
        ...


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
    said: str = ""
    """What differs, where `expected` and `got` cannot say it."""


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
    draws: ClassVar[bool] = False
    """Whether its result can be drawn, see `drawing.Drawn`."""
    numbers_follow: ClassVar[bool] = False
    """Whether the numbers of a row mean something else once its decision is another, so that they are not compared."""
    class_axis: ClassVar[int | None] = None
    """The axis along which every class has a number; None where there are no classes."""
    before_classes: ClassVar[int] = 0
    """How many other numbers stand before those of the classes along it."""
    one_is_right: ClassVar[bool] = False
    """Whether exactly one of the classes is right at each place, so that a softmax along the axis is a probability;
    otherwise any number of them may be, each by its own sigmoid."""

    def first_class(self, spec: AnswerSpec) -> int:
        """The place along `class_axis` of the number of the first class."""
        del spec
        return self.before_classes

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
            for difference in apart(what, wanted, other[what], margin, flip_margin)
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


class ArgMax(Kind):
    """Logits, the largest of which along an axis is the decision."""

    decides = True
    one_is_right = True
    class_axis: ClassVar[int] = -1
    axes: ClassVar[tuple[int, ...]] = ()
    """Numbers of axes that are possible, all if empty."""
    form: ClassVar[str] = ""

    def decisions(self, spec: AnswerSpec, outputs: Outputs) -> dict[str, NDArray[np.int64]]:
        """The place of the largest logit."""
        return {LABEL_DIFFERS: np.asarray(outputs[spec.name].argmax(axis=self.class_axis), np.int64)}

    def margins(self, spec: AnswerSpec, outputs: Outputs) -> NDArray[np.float32] | None:
        """Half of what the largest logit is ahead: two logits that move by less cannot change places."""
        logits = outputs[spec.name]
        classes = logits.shape[self.class_axis]
        top = np.partition(logits, [max(0, classes - 2), classes - 1], axis=self.class_axis)
        first, second = (np.take(top, at, axis=self.class_axis).astype(np.float64) for at in (-1, max(0, classes - 2)))
        return np.asarray((first - second) / 2, np.float32)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """Wrong number of axes, or as many names as there are no classes."""
        tensor = tensors[spec.name]
        if self.axes and len(tensor.shape) not in self.axes:
            return f"the output {spec.name!r} has the shape {list(tensor.shape)}, and {self.name} are {self.form}"
        return mismatch(spec, tensor, self.class_axis) or super().unfit(spec, tensors)


def apart(
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


def is_finite(values: NDArray[Any]) -> bool:
    """Whether all of them are."""
    # for small arrays `all` takes longer than all the rest
    return b"\0" not in np.isfinite(values).tobytes()


def with_overflown(values: NDArray[Any], refused: dict[int, str], meaning: Meaning) -> dict[int, str]:
    """`refused` and the rows without finite outputs although their input is finite.

    Raises:
        EdgewrightError: every row is like that.
    """
    if is_finite(values):
        return refused
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).tolist()
    text = f"{meaning.model} gave outputs that are not finite for a finite input: it overflows, `verify` shows where"
    if len(bad) == len(values):
        raise EdgewrightError(text)
    return {**dict.fromkeys(bad, text), **refused}


def blanked(values: NDArray[Any], rows: Mapping[int, str], blank: float) -> NDArray[Any]:
    """`values` with `blank` in the rows that have no answer."""
    if rows:
        values = values.copy()
        values[list(rows)] = blank
    return values


def label_name(index: int, labels: tuple[str, ...]) -> str:
    """Name of a class; its number where there is no name, ``refused`` for -1."""
    if index < 0:
        return "refused"
    return labels[index] if index < len(labels) else str(index)


def json_numbers(values: NDArray[Any]) -> Any:
    """Nested lists with None for what is not finite, because JSON has no NaN."""
    numbers = values.astype(object)
    if values.dtype.kind in "fc":
        numbers[~np.isfinite(values)] = None
    return numbers.tolist()


def mismatch(spec: AnswerSpec, tensor: TensorSpec, axis: int) -> str | None:
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
