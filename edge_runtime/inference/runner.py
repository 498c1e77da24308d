"""A model that is ready: `run` takes arrays as the graph wants them, `predict` images or rows to classify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..answers.kind import Meaning, Placed
from ..answers.table import answers_by_names, kind_of
from ..bundle.bundle import Bundle
from ..bundle.consistency import unknown_exit, unlike
from ..bundle.manifest import ANSWERS, EXIT_INDEX, LABEL, LABELS, LOGITS, SCORES, AnswerSpec, Manifest, Preprocessing
from ..bundle.typed_json import strict_json, typed
from ..errors import BundleError, EdgewrightError, InputError
from .feeds import FeedChecker, as_array, is_finite, prepare, specs_of, unusable_rows
from .providers import Placement

_MOST_KNOWN = 256
"""Forms of input that `Runner.predict` remembers."""


class Runner:
    """A session with what is known about its inputs. Made by `load` and `session_on`.

    Attributes:
        inputs: what `run` takes.
        output_names: what `run` returns, in the graph's order.
        placement: which provider runs what.
        thresholds: the values this session runs with; None: those stored in the graph of a bare model.
        threads: intra-op threads; None: ONNX Runtime's choice.
        manifest: of the bundle; None for a bare model.
        answers: what the outputs mean.
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
        self.answers = manifest.answers if manifest is not None else _answers_of(session, path)
        self._answers = [(spec, kind_of(spec)) for spec in self.answers]
        self._preprocessing = manifest.preprocessing if manifest is not None else None
        exits = () if manifest is None else tuple(exit_.name for exit_ in manifest.exits)
        excludes = manifest is not None and manifest.policy is not None and manifest.policy.excludes
        self._meaning = Meaning(exits, excludes, path.name)
        specs = {spec.name: spec for spec in manifest.outputs} if manifest is not None else {}
        names = [name for spec, kind in self._answers for name in kind.outputs(spec) if name in specs]
        self._promised = tuple((self._wanted.index(name), specs[name]) for name in names)
        self._exit_at = self._wanted.index(EXIT_INDEX) if EXIT_INDEX in names else None
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

    def predict(self, x: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """Answers one row or many.

        NaN or infinity in the input has no answer: one row is refused with an error, and of many rows the unusable
        ones are marked in the result's `refused` while the others are answered. (`run` passes such values on.)

        Args:
            x: images [H, W, C] or [N, H, W, C], uint8 or, where the manifest's preprocessing has a `max_value`, deeper
                integers, which are preprocessed as the manifest says; or what
                the graph takes, with or without the batch axis; or a mapping of input names to the latter.

        Returns:
            What the kind of the answer is (`Runner.answers`): `Prediction` of ``classes`` and ``exits``, `Values` of
            ``values``, `ClassMap` of ``class_map``, `Tokens` of ``tokens``. Of a model with several answers a dict of
            them by name.

        Raises:
            InputError: `x` fits none of these, no row of it is finite, or a bare model has none of the known outputs.
            EdgewrightError: ONNX Runtime failed inside the graph, or no row has finite scores or outputs.
        """
        if type(x) is np.ndarray:
            add_axis = self._known_forms.get((x.shape, x.dtype))
            if add_axis is not None and is_finite(x):
                # of a form that has been here before: nothing is left to prepare or to check
                return self._results(self._outputs({self.inputs[0].name: x[None] if add_axis else x}), {})
        feeds = prepare(x, self.inputs, self._preprocessing)
        refused: dict[int, str] = {}
        for value in feeds.values():
            if not is_finite(value):
                feeds, refused = _with_stand_ins(feeds, unusable_rows(feeds))
                break
        results = self._results(list(self.run_rows(feeds).values()), refused)
        size = _size_of_pictures(x, self._preprocessing)
        if size is not None:
            results = _placed(results, *size)
        if type(x) is np.ndarray and not refused:
            self._remember(x, next(iter(feeds.values())))
        return results

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

    def require_known(self, outputs: Sequence[NDArray[Any]]) -> None:
        """Refuses answers that the manifest does not know: an exit that it has not, scores for more or fewer classes.

        Args:
            outputs: of any number of rows, in the order of `output_names`; nothing is asked of those of a bare model.

        Raises:
            BundleError: says what the graph answered.
        """
        if self.manifest is None:
            return
        reason = None
        for at, spec in self._promised:
            reason = reason or unlike((*spec.shape[:1], *outputs[at].shape[1:]), spec)
        if reason is None and self._exit_at is not None:
            reason = unknown_exit(outputs[self._exit_at], self.manifest.exits)
        if reason is not None:
            raise BundleError(f"{self.path}: {reason}: the bundle does not belong together, export it again")

    def _results(self, outputs: list[NDArray[Any]], refused: dict[int, str]) -> Any:
        self.require_known(outputs)
        if not self._answers:
            raise InputError(
                f"{self.path} does not say what its outputs mean ({', '.join(self.output_names)}), and has neither "
                f"{LABEL!r} nor {LOGITS!r}: use run() instead of predict()"
            )
        named = dict(zip(self._wanted, outputs, strict=True))
        if len(self._answers) == 1:
            spec, kind = self._answers[0]
            return kind.predict(spec, named, refused, self._meaning)
        return {spec.name: kind.predict(spec, named, refused, self._meaning) for spec, kind in self._answers}

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


def _answers_of(session: Any, path: Path) -> tuple[AnswerSpec, ...]:
    """What the outputs of a bare model mean; one of ours says so in its metadata.

    Raises:
        BundleError: the metadata are damaged, or name a kind that is not known.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    if ANSWERS in metadata:
        try:
            data = strict_json(metadata[ANSWERS])
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path}: its metadata {ANSWERS} are not JSON ({error}): export it again") from None
        answers: tuple[AnswerSpec, ...] = typed(tuple[AnswerSpec, ...], data, f"{path}: {ANSWERS}")
        for spec in answers:
            kind_of(spec)
        return answers
    outputs = {output.name: len(output.shape) for output in session.get_outputs()}
    return answers_by_names(
        outputs,
        () if str(metadata.get(LABELS, "")).strip() == "[]" else None,
        exits={LABEL, SCORES, EXIT_INDEX} <= outputs.keys(),
        tokens=any(given.type == "tensor(int64)" for given in session.get_inputs()),
    )


def _size_of_pictures(x: Any, preprocessing: Preprocessing | None) -> tuple[int, int] | None:
    """Height and width where pixels were given, which were resized."""
    if preprocessing is None or preprocessing.kind != "image" or isinstance(x, Mapping):
        return None
    pixels = np.asarray(x)
    if pixels.ndim < 3 or pixels.dtype.kind not in "ui":
        return None
    return int(pixels.shape[-3]), int(pixels.shape[-2])


def _placed(results: Any, height: int, width: int) -> Any:
    if isinstance(results, dict):
        return {name: _placed(result, height, width) for name, result in results.items()}
    return results.placed(height, width) if isinstance(results, Placed) else results


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
