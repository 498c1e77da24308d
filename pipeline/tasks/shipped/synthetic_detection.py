"""Characters scattered over pages that need no files: where which of them is, to try recipes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...task import SplitName
from ..detection import GRID, Detection, mirrored
from .pages import CHARACTERS, draw_book
from .raw_images import RawImages


def synthetic_detection(
    seed: int = 0,
    rows: Mapping[SplitName, int] | None = None,
    size: int = 64,
    characters: str = CHARACTERS,
    most: int = 5,
    strides: Sequence[int] = (4, 8),
    system_fonts: bool = False,
    flip: bool = False,
    metric: str = "map_50",
    decoder: str = GRID,
) -> Detection:
    """Pages [1, size, size], and a box around each character.

    Args:
        seed: of fonts, places, distortions and noise.
        rows: pages in every split, default train 600, calibration 100, validation 200, test 400.
        size: side of the pages in pixels.
        characters: the classes.
        most: characters on a page.
        strides: of the levels of the model's head, see `Detection`.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.
        flip: mirror half of the training pages, with their boxes.
        metric: ``map`` or ``map_50``.
        decoder: ``grid``, or ``model`` for a model with a `box_decoder`.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    book = draw_book(seed, rows, size, characters, most, system_fonts)
    return Detection(
        {name: RawImages(pages.images, pages.boxes, book.preprocessing) for name, pages in book.pages.items()},
        tuple(characters),
        size=size,
        strides=strides,
        decoder=decoder,
        metric=metric,
        preprocessing=book.preprocessing,
        augment=mirrored if flip else None,
        name="synthetic_detection",
        provenance=book.provenance,
        file_digests=book.file_digests,
    )
