"""Characters scattered over pages that need no files: which pixel belongs to which, to try recipes on."""

from __future__ import annotations

from collections.abc import Mapping

from ...task import SplitName
from ..segmentation import Segmentation
from .pages import CHARACTERS, draw_book
from .raw_images import RawImages


def synthetic_segmentation(
    seed: int = 0,
    rows: Mapping[SplitName, int] | None = None,
    size: int = 64,
    characters: str = CHARACTERS,
    most: int = 5,
    system_fonts: bool = False,
    metric: str = "mean_iou",
) -> Segmentation:
    """Pages [1, size, size] with a class for each pixel: background, or one of the characters.

    Args:
        seed: of fonts, places, distortions and noise.
        rows: pages in every split, default train 600, calibration 100, validation 200, test 400.
        size: side of the pages in pixels.
        characters: the classes beside the page.
        most: characters on a page.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.
        metric: ``mean_iou`` or ``pixel_accuracy``.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    book = draw_book(seed, rows, size, characters, most, system_fonts)
    return Segmentation(
        {name: RawImages(pages.images, pages.masks, book.preprocessing) for name, pages in book.pages.items()},
        ("background", *characters),
        metric=metric,
        preprocessing=book.preprocessing,
        name="synthetic_segmentation",
        provenance=book.provenance,
        file_digests=book.file_digests,
    )
