"""A class map as an image: a color for each class, as a palette."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle.answer import CLASS_MAP
from ..bundle.manifest import AnswerSpec
from ..errors import InputError
from .prediction import ClassMap, Result

_MOST_CLASSES = 255
_REFUSED = 255


def check_class_map(answers: Sequence[AnswerSpec], path: Path) -> None:
    """Refuses what cannot be drawn, before anything has run.

    Raises:
        InputError: no answer is a class map, the file is no .png, or Pillow is not installed.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: class maps are written as .png: give the file such a name")
    if not any(spec.kind == CLASS_MAP for spec in answers):
        kinds = ", ".join(sorted({spec.kind for spec in answers}))
        raise InputError(f"--save draws a class for each pixel, and this model answers {kinds}: use --json instead")
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise InputError("--save needs Pillow: pip install pillow, or use --json instead") from None


def save_class_map(results: Mapping[str, Result], path: Path) -> None:
    """Writes the first class map, its rows below each other, as a PNG whose palette index is the class.

    Args:
        results: of `predict` by name, see `check_class_map`.
        path: file to write.

    Raises:
        InputError: more classes than a palette has, or the file cannot be written.
    """
    from PIL import Image

    found = next(result for result in results.values() if isinstance(result, ClassMap))
    largest = int(found.label.max(initial=0))
    if largest >= _MOST_CLASSES:
        raise InputError(f"the class {largest} has no place in a palette of {_MOST_CLASSES}: use --json instead")
    pixels = np.where(found.label < 0, _REFUSED, found.label).astype(np.uint8)
    image = Image.fromarray(pixels.reshape(-1, pixels.shape[-1]))
    image = image.convert("L")
    image.putpalette(palette().ravel().tolist())
    try:
        image.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def palette() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Colors of the classes 0 to 254, black first, neighbours far apart; white for rows that were refused.

    Returns:
        uint8 [256, 3].
    """
    # the bits of the class in turn to red, green and blue, the lowest as the strongest: distinct for all 256
    colors = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for bit in range(8):
        colors[:, bit % 3] |= (((index >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    colors[_REFUSED] = 255
    return colors
