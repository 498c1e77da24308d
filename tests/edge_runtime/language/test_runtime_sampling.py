"""Choosing tokens from logits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.edge_runtime.errors import EdgewrightError, InputError
from edgewright.edge_runtime.language.sampling import Sampling

LOGITS = np.log(np.asarray([0.1, 0.4, 0.2, 0.2, 0.1], np.float32))


def frequencies(sampling: Sampling, draws: int = 1500) -> NDArray[np.float64]:
    random = sampling.generator()
    chosen = [sampling.choose(LOGITS, random) for _ in range(draws)]
    return np.bincount(chosen, minlength=len(LOGITS)) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.2, 0.1]),
        ({"temperature": 0.5}, [1 / 26, 16 / 26, 4 / 26, 4 / 26, 1 / 26]),
        # of two equally likely ones, the first
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.1, 0.4, 0.2, 0.2, 0.1]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 0.5, 0.25, 0.25, 0]),
        ({"temperature": 1.0, "top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(options: dict[str, float], expected: list[float]) -> None:
    found = frequencies(Sampling(**options))  # type: ignore[arg-type]
    assert np.abs(found - expected).max() < 0.05
    assert ((found == 0) == (np.asarray(expected) == 0)).all()


def test_a_seed_repeats_its_draws() -> None:
    one, again, other = (
        [s.choose(LOGITS, random) for _ in range(30)]
        for s in (Sampling(1.0, seed=1), Sampling(1.0, seed=1), Sampling(1.0, seed=2))
        for random in [s.generator()]
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is a number"),
        ({"temperature": float("nan")}, "temperature is a number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p lies above 0"),
        ({"seed": -1}, "seed is at least 0"),
        ({"top_k": 3}, "set a temperature"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sampling(**options)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EdgewrightError, match="not finite"):
        Sampling().choose(np.asarray([0.0, np.nan], np.float32), np.random.default_rng(0))
