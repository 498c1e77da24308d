"""Sounds that are made up, to try recipes for audio on: what they do over time is their class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..image_classification import ImageClassification

_LABELS = ("rising", "falling", "warble", "pulses", "two tones", "noise")


def synthetic_audio(seed: int = 0, rows: int = 900, rate: int = 8000, noise: float = 0.5) -> ImageClassification:
    """Half a second of sound [rate // 2]: tones that rise, fall, warble, come in pulses or two at once, or none.

    All are about as loud, in the same range of pitch and under noise, so that neither loudness nor pitch tells them.

    Args:
        seed: of the sounds.
        rows: of all splits together.
        rate: samples a second.
        noise: of the background, where the tones have a deviation of about 0.35.

    Raises:
        DataError: too few rows or samples.
    """
    if not isinstance(rows, int) or rows < 60 or not isinstance(rate, int) or rate < 4000:
        raise DataError(f"rows {rows!r} and rate {rate!r}: give at least 60 rows and 4000 samples a second")
    rng = np.random.default_rng(seed)
    classes = np.arange(rows) % len(_LABELS)
    sounds = np.stack([_sound(rng, _LABELS[label], rate, noise) for label in classes])
    return ImageClassification.from_arrays(
        sounds.astype(np.float32), classes, _LABELS, seed=seed, name="synthetic_audio", input_name="sound"
    )


def _sound(rng: np.random.Generator, label: str, rate: int, noise: float) -> NDArray[np.float64]:
    time = np.arange(rate // 2) / rate
    low, depth = rng.uniform(400, 1000), rng.uniform(0.3, 0.8)
    share = time / time[-1]
    pitch = {
        "rising": low * (1 + depth * share),
        "falling": low * (1 + depth * (1 - share)),
        "warble": low * (1 + depth / 2 * (1 + np.sin(2 * np.pi * rng.uniform(4, 9) * time + rng.uniform(0, 6)))),
    }.get(label, np.full_like(time, low * (1 + depth * rng.uniform(0, 1))))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate + rng.uniform(0, 6))
    if label == "pulses":
        tone *= np.sqrt(2) * (np.sin(2 * np.pi * rng.uniform(5, 10) * time + rng.uniform(0, 6)) > 0)
    elif label == "two tones":
        other = pitch * rng.uniform(1.2, 1.6)
        tone = (tone + np.sin(2 * np.pi * np.cumsum(other) / rate)) / np.sqrt(2)
    elif label == "noise":
        smooth = np.convolve(rng.normal(size=len(time)), np.ones(4) / 2, "same")
        tone = smooth / np.sqrt(2)
    background: NDArray[np.float64] = noise * rng.normal(size=len(time))
    return 0.3 * (rng.uniform(0.8, 1.6) * tone + background)
