"""Answers that are looked at rather than read, as an image file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec
from ..errors import InputError
from .kind import Placed, Result
from .table import KINDS, kind_of

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class Drawn(Protocol):
    """A result that can be drawn."""

    def drawn(self, pictures: NDArray[np.uint8] | None) -> Image.Image:
        """The image.

        Args:
            pictures: what was answered, [N, H, W, 3]; None where no image was given.

        Raises:
            InputError: it cannot be drawn.
        """
        ...


def check_drawn(answers: Sequence[AnswerSpec], path: Path) -> None:
    """Refuses what cannot be drawn, before anything has run.

    Raises:
        InputError: no answer is one that is drawn, the file is no .png, or Pillow is not installed.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: answers are drawn as .png: give the file such a name")
    if not any(kind_of(spec).draws for spec in answers):
        kinds = ", ".join(sorted({spec.kind for spec in answers}))
        drawn = ", ".join(name for name, kind in KINDS.items() if kind.draws)
        raise InputError(f"--save draws {drawn}, and this model answers {kinds}: use --json instead")
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise InputError("--save needs Pillow: pip install pillow, or use --json instead") from None


def placed_on(results: Mapping[str, Result], pictures: NDArray[Any]) -> dict[str, Result]:
    """The results in pixels of the pictures [N, H, W, C] that were given."""
    height, width = pictures.shape[1:3]
    return {
        name: result.placed(height, width) if isinstance(result, Placed) else result for name, result in results.items()
    }


def save_drawn(results: Mapping[str, Result], path: Path, pictures: NDArray[Any] | None = None) -> None:
    """Writes the first answer that can be drawn.

    Args:
        results: of `predict` by name, see `check_drawn`.
        path: .png to write.
        pictures: what was answered, [N, H, W, C], deep ones are drawn as their brightest pixel allows; None where no
            image was given.

    Raises:
        InputError: it cannot be drawn, or the file cannot be written.
    """
    if pictures is not None and pictures.dtype != np.uint8:
        pictures = (255.0 * pictures / max(1, pictures.max())).astype(np.uint8)
    found = next(result for result in results.values() if isinstance(result, Drawn))
    try:
        found.drawn(pictures).save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
