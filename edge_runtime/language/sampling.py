"""Choosing the next token from logits: the likeliest one, or a draw among likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgewrightError, InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; draws are the same for the same seed, prompts and logits.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_k: draws among so many likeliest tokens; None: among all.
        top_p: draws among the likeliest tokens that together have at least this probability, at `temperature` and after
            `top_k`; None: among all.
        seed: of the draws.

    Raises:
        InputError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < np.inf:
            raise InputError(f"temperature is a number of at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is at least 1, not {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p lies above 0 and is at most 1, not {self.top_p}")
        if self.seed < 0:
            raise InputError(f"seed is at least 0, not {self.seed}")
        if self.temperature == 0.0 and (self.top_k or self.top_p):
            raise InputError("top_k and top_p choose among draws, and temperature 0 draws nothing: set a temperature")

    def generator(self) -> np.random.Generator:
        """Fresh, for one generation."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: NDArray[np.float32], random: np.random.Generator) -> int:
        """The next token after logits [V].

        Raises:
            EdgewrightError: a logit is not finite.
        """
        if not np.isfinite(logits).all():
            raise EdgewrightError("the model gave logits that are not finite: run `verify` on this device")
        if self.temperature == 0.0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        # likeliest first, equal ones in the order of their numbers
        order = np.argsort(-scaled, kind="stable")[: self.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        if self.top_p is not None:
            before = np.cumsum(weights) - weights
            kept = int((before < self.top_p).sum())
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        return int(random.choice(order, p=weights))
