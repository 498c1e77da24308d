"""Every kind of answer by name, and what outputs mean that nobody has declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..bundle.manifest import LOGITS, AnswerSpec
from ..errors import BundleError
from .boxes import BoxesKind
from .class_map import ClassMapKind
from .classes import CLASSES, Classes, Exits, exits_answer
from .embedding import EmbeddingKind
from .image import ImageKind
from .kind import Kind
from .multilabel import MultilabelKind
from .tokens import TOKENS, TokensKind
from .values import VALUES, ValuesKind

_ALL = (
    Classes(),
    Exits(),
    MultilabelKind(),
    ValuesKind(),
    ClassMapKind(),
    BoxesKind(),
    TokensKind(),
    EmbeddingKind(),
    ImageKind(),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
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
