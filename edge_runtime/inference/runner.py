"""A model that is ready: `run` takes arrays as the graph wants them, `predict` images or rows to classify."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bundle.bundle import Bundle
from ..bundle.manifest import EXIT_INDEX, LABEL, LABELS, LOGITS, SCORES, Manifest
from ..errors import EdgewrightError, InputError
from .feeds import FeedChecker, as_array, is_finite, prepare, specs_of, unusable_rows
from .providers import Placement

_MOST_KNOWN = 256
"""Forms of input that `Runner.predict` remembers."""


class Prediction(NamedTuple):
    """What a network said about N rows: a classifier in labels and scores, any other in `outputs`.

    Attributes:
        label: int64 [N]; -1 for a row that was refused. Empty where the task has no classes.
        scores: float32 [N, C], see `score_kinds` for what they are; NaN for a row that was refused. [N, 0] where the
            task has no classes.
        exit_index: int64 [N], 0 for a model without exits; -1 for a row that was refused.
        labels: the C names, empty if the manifest has none.
        exits: name of every exit, in the order of `exit_index`; empty if there is no manifest.
        excludes: whether the exits rule classes out, whose scores are then exactly 0.
        refused: row -> why it has no answer; such a row changes nothing in the others.
        outputs: of a task without classes: output name -> what the graph gave, [N, ...], in its own dtype and unit; for
            a row that was refused NaN, or 0 where that is no float. Empty for a classifier.
    """

    label: NDArray[np.int64]
    scores: NDArray[np.float32]
    exit_index: NDArray[np.int64]
    labels: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    excludes: bool = False
    refused: Mapping[int, str] = MappingProxyType({})
    outputs: Mapping[str, NDArray[Any]] = MappingProxyType({})

    @property
    def label_names(self) -> list[str]:
        """Name of every label; the number as text where the manifest has no name, ``refused`` for -1."""
        return [_label_name(i, self.labels) for i in self.label.ravel().tolist()]

    @property
    def score_kinds(self) -> list[str]:
        """What the scores of every row are.

        - ``probability``: a softmax over all classes.
        - ``probability_of_remaining``: a softmax over the classes that no exit has excluded.
        - ``exclusion``: the row left early because every other class was excluded. The survivor has 1 as a mark of
          that; it is no probability.
        - ``value``: the task has no classes: there are no scores, `outputs` are the answer.
        - ``none``: the row was refused.
        """
        last = len(self.exits) - 1
        kinds = []
        for row, exit_index in enumerate(self.exit_index.reshape(len(self.exit_index), -1)[:, 0].tolist()):
            if row in self.refused:
                kinds.append("none")
            elif self.outputs:
                kinds.append("value")
            elif not self.excludes or bool((self.scores[row] > 0).all()):
                kinds.append("probability")
            else:
                alone = exit_index < last and int((self.scores[row] > 0).sum()) == 1
                kinds.append("exclusion" if alone else "probability_of_remaining")
        return kinds


class Runner:
    """A session with what is known about its inputs. Made by `load` and `session_on`.

    Attributes:
        inputs: what `run` takes.
        output_names: what `run` returns, in the graph's order.
        placement: which provider runs what.
        thresholds: the values this session runs with; None: those stored in the graph of a bare model.
        threads: intra-op threads; None: ONNX Runtime's choice.
        manifest: of the bundle; None for a bare model.
        owned_bundle: the bundle that `close` closes too.
    """

    def __init__(
        self,
        session: Any,
        *,
        path: Path,
        placement: Placement,
        manifest: Manifest | None,
        thresholds: tuple[float, ...] | None,
        threads: int | None,
    ) -> None:
        self.session = session
        self.path = path
        self.placement = placement
        self.manifest = manifest
        self.thresholds = thresholds
        self.threads = threads
        self.inputs = manifest.inputs if manifest is not None else specs_of(session.get_inputs())
        self.output_names = tuple(output.name for output in session.get_outputs())
        self.owned_bundle: Bundle | None = None
        self._wanted = list(self.output_names)  # given by name: ONNX Runtime would collect them again at every run
        # what `predict` needs at every call, found once
        self._known_forms: dict[tuple[tuple[int, ...], np.dtype[Any]], bool] = {}
        answer = (LABEL, SCORES, EXIT_INDEX)
        self._answer_at = (
            tuple(self._wanted.index(name) for name in answer) if set(answer) <= set(self._wanted) else None
        )
        self._preprocessing = manifest.preprocessing if manifest is not None else None
        self._meaning = _meaning(manifest)
        self._without_classes = self._answer_at is None and _without_classes(manifest, session)
        # with exits and any number of rows, all rows may have left: such a graph also takes none
        self._checked = FeedChecker(self.inputs, no_rows=EXIT_INDEX in self._wanted and not self.takes_single_rows)

    @property
    def takes_single_rows(self) -> bool:
        """Whether a run takes exactly one row."""
        if self.manifest is not None:
            return self.manifest.batch == "single"
        return all(spec.shape[:1] == (1,) for spec in self.inputs)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph once.

        NaN in the input is passed on, and shows in the output.

        Args:
            feeds: an array for every input, with exactly the dtype and shape of the manifest.

        Returns:
            Output name -> array.

        Raises:
            InputError: a name, dtype or shape that does not fit; the text says what was wanted.
            EdgewrightError: ONNX Runtime failed inside the graph.
        """
        return dict(zip(self._wanted, self._outputs(self._checked(feeds)), strict=True))

    def run_rows(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Like `run` for any number of rows: loops where the model takes one row a run, and concatenates.

        Args:
            feeds: arrays whose first axis is the batch.

        Raises:
            InputError: as `run`; or inputs with different numbers of rows.
        """
        arrays = {name: as_array(name, value) for name, value in feeds.items()}
        if not self.takes_single_rows:
            return self.run(arrays)
        rows = {value.shape[0] if value.ndim else 0 for value in arrays.values()}
        if rows == {1}:
            return self.run(arrays)
        if len(rows) != 1 or rows == {0}:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
            raise InputError(f"the inputs need the same number of rows, at least one, in axis 0: got {shapes}")
        parts = [self.run({k: v[i : i + 1] for k, v in arrays.items()}) for i in range(rows.pop())]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}

    def predict(self, x: ArrayLike | Mapping[str, ArrayLike]) -> Prediction:
        """Answers one row or many: with labels and scores, or with the graph's outputs where the task has no classes.

        NaN or infinity in the input has no answer: one row is refused with an error, and of many rows the unusable
        ones are marked in `Prediction.refused` while the others are answered. (`run` passes such values on.)

        Args:
            x: images [H, W, C] or [N, H, W, C], uint8 or, where the manifest's preprocessing has a `max_value`, deeper
                integers, which are preprocessed as the manifest says; or what
                the graph takes, with or without the batch axis; or a mapping of input names to the latter.

        Raises:
            InputError: `x` fits none of these, no row of it is finite, or a bare model has none of the known outputs.
            EdgewrightError: ONNX Runtime failed inside the graph, or no row has finite scores or outputs.
        """
        if type(x) is np.ndarray:
            add_axis = self._known_forms.get((x.shape, x.dtype))
            if add_axis is not None and is_finite(x):
                # of a form that has been here before: nothing is left to prepare or to check
                return self._prediction(self._outputs({self.inputs[0].name: x[None] if add_axis else x}), {})
        feeds = prepare(x, self.inputs, self._preprocessing)
        refused: dict[int, str] = {}
        for value in feeds.values():
            if not is_finite(value):
                feeds, refused = _with_stand_ins(feeds, unusable_rows(feeds))
                break
        prediction = self._prediction(list(self.run_rows(feeds).values()), refused)
        if type(x) is np.ndarray and not refused:
            self._remember(x, next(iter(feeds.values())))
        return prediction

    def _remember(self, given: NDArray[Any], fed: NDArray[Any]) -> None:
        """Keeps the form of an array that needs no more than a batch axis to be run at once."""
        at_once = not self.takes_single_rows or len(fed) == 1
        # an image that is preprocessed has another dtype afterwards
        if at_once and given.dtype == fed.dtype and len(self._known_forms) < _MOST_KNOWN:
            self._known_forms[given.shape, given.dtype] = given.ndim < fed.ndim

    def _outputs(self, arrays: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            outputs: list[NDArray[Any]] = self.session.run(self._wanted, arrays)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            if self.session is None:
                raise EdgewrightError(f"the runner of {self.path} is closed: load it again") from None
            if isinstance(error, EdgewrightError):
                raise
            raise EdgewrightError(f"ONNX Runtime failed while running {self.path}: {error}") from error
        return outputs

    def _prediction(self, outputs: list[NDArray[Any]], refused: dict[int, str]) -> Prediction:
        if self._answer_at is not None:
            at_label, at_scores, at_exit = self._answer_at
            label, scores, exit_index = outputs[at_label], outputs[at_scores], outputs[at_exit]
        elif self._without_classes:
            return self._raw(outputs, refused)
        elif LOGITS in self._wanted:
            scores = softmax(outputs[self._wanted.index(LOGITS)])
            label = np.asarray(scores.argmax(axis=-1), np.int64)
            exit_index = np.zeros(label.shape, np.int64)
        else:
            raise InputError(
                f"{self.path} has neither {LABEL!r} nor {LOGITS!r} among its outputs "
                f"({', '.join(self.output_names)}): use run() instead of predict()"
            )
        if refused or not is_finite(scores):
            label, scores, exit_index = label.copy(), scores.copy(), exit_index.copy()
            refused = {**_overflown(scores, self.path), **refused}
            rows = list(refused)
            label[rows], scores[rows], exit_index[rows] = -1, np.nan, -1
        return Prediction(label, scores, exit_index, *self._meaning, refused)

    def _raw(self, outputs: list[NDArray[Any]], refused: dict[int, str]) -> Prediction:
        """What the graph gave, as it is."""
        for value in outputs:
            if not is_finite(value):
                refused = {**_overflown(value, self.path), **refused}
        rows = list(refused)
        if rows:
            outputs = [value.copy() for value in outputs]
            for value in outputs:
                value[rows] = np.nan if value.dtype.kind in "fc" else 0
        exit_index = np.zeros(len(outputs[0]), np.int64)
        exit_index[rows] = -1
        label, scores = np.zeros(0, np.int64), np.zeros((len(outputs[0]), 0), np.float32)
        found = dict(zip(self._wanted, outputs, strict=True))
        return Prediction(label, scores, exit_index, *self._meaning, refused, found)

    def close(self) -> None:
        """Releases the session and the temporary folder of a zip."""
        self.session = None
        if self.owned_bundle is not None:
            self.owned_bundle.close()
            self.owned_bundle = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _meaning(manifest: Manifest | None) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """What `Prediction` takes from the manifest: labels, exits, excludes."""
    if manifest is None:
        return (), (), False
    excludes = manifest.policy is not None and manifest.policy.excludes
    return manifest.labels, tuple(exit_.name for exit_ in manifest.exits), excludes


def _without_classes(manifest: Manifest | None, session: Any) -> bool:
    """Whether the task has no labels, so that outputs are no logits; a bare model of ours says so in its metadata."""
    if manifest is not None:
        return not manifest.labels
    return str(session.get_modelmeta().custom_metadata_map.get(LABELS, "")).strip() == "[]"


def _label_name(index: int, labels: tuple[str, ...]) -> str:
    if index < 0:
        return "refused"
    return labels[index] if index < len(labels) else str(index)


def _with_stand_ins(
    feeds: Mapping[str, NDArray[Any]], refused: dict[int, str]
) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
    """Puts a usable row in the place of every unusable one, so that the batch keeps its size.

    Raises:
        InputError: no row is usable.
    """
    rows = len(next(iter(feeds.values())))
    usable = next((row for row in range(rows) if row not in refused), None)
    if usable is None:
        raise InputError(f"{refused[0]}: nothing can be said about it; repair the data, or mask what is missing")
    clean = {name: value.copy() for name, value in feeds.items()}
    for value in clean.values():
        value[list(refused)] = value[usable]
    return clean, refused


def _overflown(scores: NDArray[Any], path: Path) -> dict[int, str]:
    """Rows without finite scores although their input is finite.

    Raises:
        EdgewrightError: every row is like that.
    """
    bad = np.flatnonzero(~np.isfinite(scores.reshape(len(scores), -1)).all(axis=1)).tolist()
    text = f"{path.name} gave scores that are not finite for a finite input: it overflows, `verify` shows where"
    if len(bad) == len(scores):
        raise EdgewrightError(text)
    return dict.fromkeys(bad, text)


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities along the last axis, float32; NaN stays NaN."""
    # the ufuncs themselves: for a row of classes numpy's methods take longer than the arithmetic
    values = logits.astype(np.float32, copy=False)
    exponentials = np.exp(values - np.maximum.reduce(values, axis=-1, keepdims=True))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return np.asarray(exponentials, np.float32)
