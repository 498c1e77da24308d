"""What the export asks of a task; `edgewright.pipeline.task.Task` extends it by what training and reports ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgewright.edge_runtime.answers.classes import CLASSES, EXITS
from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.answers.tokens import TOKENS
from edgewright.edge_runtime.answers.values import VALUES
from edgewright.edge_runtime.bundle.manifest import LOGITS, PRESENT, AnswerSpec, Preprocessing
from edgewright.edge_runtime.errors import BundleError, ExportError

if TYPE_CHECKING:  # the simplifier's child process reads this package, and torch takes seconds to load
    from torch import Tensor


class SourceBatch(Protocol):
    """Some rows."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The model's inputs in the order it takes them, batch first."""
        ...


class SourceSplit(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> SourceBatch:
        """The rows at `indices`.

        Raises:
            InputError: a row cannot be read or is not finite; names it.
        """
        ...


class Source(Protocol):
    """Names, axes, labels and real inputs."""

    @property
    def name(self) -> str:
        """A short name for reports."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, one of which each row is; their number is the number of logits.

        Empty where rows have no class; what the model answers then, `Answering` says.
        """
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order; they become the ONNX input names."""
        ...

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """Per input: axis -> name, for the axes that may vary. Axis 0 is ``"batch"``."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How a raw image becomes the input on the device."""
        ...

    @property
    def splits(self) -> Mapping[Any, SourceSplit]:
        """Splits by name; `test` is used for parity, else whatever there is."""
        ...


@runtime_checkable
class Answering(Protocol):
    """A source that says what its model answers; for anything but logits [N, C] of one class for each row."""

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """The outputs, by name, and where they lie in what the model returns."""
        ...


@runtime_checkable
class HasVocabulary(Protocol):
    """A source whose model predicts tokens."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens the tokenizer knows."""
        ...


@runtime_checkable
class Tokenizing(Protocol):
    """A source whose inputs are tokens of texts."""

    @property
    def tokenizer(self) -> str:
        """Content of the tokenizer.json, for the bundle."""
        ...


def answers_of(source: Source) -> tuple[AnswerSpec, ...]:
    """What the model of `source` answers: as it declares, else classes where it has labels, tokens, or values.

    Raises:
        ExportError: it declares nothing, one name or leaf twice, a name that is taken, or a kind that is not known.
    """
    if isinstance(source, Answering):
        answers = tuple(source.answers)
        _check(answers, source)
        return answers
    if source.labels:
        return (AnswerSpec(LOGITS, CLASSES, tuple(source.labels)),)
    return (AnswerSpec(LOGITS, TOKENS if isinstance(source, HasVocabulary) else VALUES),)


def _check(answers: Sequence[AnswerSpec], source: Source) -> None:
    place = f"the answers of {source.name!r}"
    if not answers:
        raise ExportError(f"{place} are none: a model answers something, leave `answers` out for one tensor")
    for spec in answers:
        try:
            kind_of(spec)
        except BundleError as error:
            raise ExportError(f"{place}: {error}") from None
        if spec.kind == EXITS:
            raise ExportError(f"{place}: {spec.kind!r} is what the early exits make of {CLASSES!r}: declare that")
        if spec.name in source.input_names or spec.name.startswith(PRESENT) or not spec.name:
            raise ExportError(f"{place}: the name {spec.name!r} is taken or empty: give the output another")
    for what in ("name", "leaf"):
        given = [getattr(spec, what) for spec in answers]
        if len(set(given)) < len(given):
            raise ExportError(f"{place} have one {what} twice ({given}): each is an output of its own")
    if len(answers) > 1 and any(spec.leaf is None for spec in answers):
        raise ExportError(f"{place} are {len(answers)}: each needs its `leaf`, an index or a key of what is returned")
