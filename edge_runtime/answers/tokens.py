"""The token that follows at each position: the kind ``tokens``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec
from .kind import ArgMax, Meaning, Outputs, blanked, with_overflown

TOKENS = "tokens"

_SHOWN = 8


class Tokens(NamedTuple):
    """The token that follows at every position; of the kind ``tokens``.

    Attributes:
        token: int64 [N, T], the likeliest; -1 for a row that was refused.
        logits: float [N, T, V]; NaN for a row that was refused.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    token: NDArray[np.int64]
    logits: NDArray[np.floating]
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.token)

    def text(self, row: int) -> str:
        """The last tokens."""
        tokens = self.token[row].ravel()
        return f"tokens {'... ' if tokens.size > _SHOWN else ''}{' '.join(map(str, tokens[-_SHOWN:].tolist()))}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"token": self.token.tolist()}


class TokensKind(ArgMax):
    """The token that follows at each position: logits [N, T, V]."""

    name = TOKENS
    axes = (3,)
    form = "logits [N, T, V]"

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Tokens:
        """The likeliest token and its logits."""
        logits = outputs[spec.name]
        refused = with_overflown(logits, refused, meaning)
        token = np.asarray(logits.argmax(axis=-1), np.int64)
        return Tokens(blanked(token, refused, -1), blanked(logits, refused, np.nan), refused)
