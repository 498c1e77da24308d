"""A model that is ready: `run` takes arrays as the graph wants them, `predict` images or rows to classify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle import Bundle
from .errors import EdgewrightError, InputError
from .feeds import check_feeds, prepare, specs_of
from .manifest import EXIT_INDEX, LABEL, LOGITS, SCORES, Manifest
from .providers import Placement


@dataclass(frozen=True)
class Prediction:
    """What a classifier said about N rows.

    Attributes:
        label: int64 [N].
        scores: float32 [N, C], probabilities; a class that an exit has excluded has exactly 0.
        exit_index: int64 [N], 0 for a model without exits.
        labels: the C names, empty if the manifest has none.
    """

    label: NDArray[np.int64]
    scores: NDArray[np.float32]
    exit_index: NDArray[np.int64]
    labels: tuple[str, ...] = ()

    @property
    def label_names(self) -> list[str]:
        """Name of every row's label; the number as text where the manifest has no name."""
        return [self.labels[i] if i < len(self.labels) else str(i) for i in self.label.ravel().tolist()]


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
        arrays = check_feeds(self.inputs, feeds)
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EdgewrightError(f"ONNX Runtime failed while running {self.path}: {error}") from error
        return dict(zip(self.output_names, outputs, strict=True))

    def run_rows(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Like `run` for any number of rows: loops where the model takes one row a run, and concatenates.

        Args:
            feeds: arrays whose first axis is the batch.

        Raises:
            InputError: as `run`; or inputs with different numbers of rows.
        """
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        if not self.takes_single_rows:
            return self.run(arrays)
        rows = {value.shape[0] if value.ndim else 0 for value in arrays.values()}
        if len(rows) != 1 or rows == {0}:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
            raise InputError(f"the inputs need the same number of rows, at least one, in axis 0: got {shapes}")
        parts = [self.run({k: v[i : i + 1] for k, v in arrays.items()}) for i in range(rows.pop())]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}

    def predict(self, x: ArrayLike | Mapping[str, ArrayLike]) -> Prediction:
        """Classifies one row or many.

        Args:
            x: uint8 images [H, W, C] or [N, H, W, C], which are preprocessed as the manifest says; or what
                the graph takes, with or without the batch axis; or a mapping of input names to the latter.

        Raises:
            InputError: `x` fits none of these, or the model is no classifier.
        """
        preprocessing = self.manifest.preprocessing if self.manifest is not None else None
        outputs = self.run_rows(prepare(x, self.inputs, preprocessing))
        labels = self.manifest.labels if self.manifest is not None else ()
        if LABEL in outputs:
            return Prediction(outputs[LABEL], outputs[SCORES], outputs[EXIT_INDEX], labels)
        if LOGITS not in outputs:
            raise InputError(
                f"{self.path} has neither {LABEL!r} nor {LOGITS!r} among its outputs "
                f"({', '.join(self.output_names)}): use run() instead of predict()"
            )
        scores = softmax(outputs[LOGITS])
        label = scores.argmax(axis=-1).astype(np.int64)
        return Prediction(label, scores, np.zeros(label.shape, np.int64), labels)

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


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Probabilities along the last axis, float32; NaN stays NaN."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True).astype(np.float32)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), np.float32)
