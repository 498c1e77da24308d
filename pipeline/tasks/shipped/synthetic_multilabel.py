"""Characters scattered over pages that need no files: which of them a page shows, to try recipes on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...task import SplitName
from ..multilabel import MultiLabel
from .pages import CHARACTERS, draw_book
from .raw_images import RawImages


def synthetic_multilabel(
    seed: int = 0,
    rows: Mapping[SplitName, int] | None = None,
    size: int = 64,
    characters: str = CHARACTERS,
    most: int = 5,
    system_fonts: bool = False,
    metric: str = "mean_average_precision",
) -> MultiLabel:
    """Pages [1, size, size], and for each character whether it is there.

    Args:
        seed: of fonts, places, distortions and noise.
        rows: pages in every split, default train 600, calibration 100, validation 200, test 400.
        size: side of the pages in pixels.
        characters: the classes.
        most: characters on a page.
        system_fonts: also use the fonts installed on this machine; without them every machine has the same task.
        metric: ``mean_average_precision`` or ``f1``.

    Raises:
        DataError: too few fonts, or arguments that make no sense.
    """
    book = draw_book(seed, rows, size, characters, most, system_fonts)
    return MultiLabel(
        {
            name: RawImages(pages.images, pages.present.astype(np.float32), book.preprocessing)
            for name, pages in book.pages.items()
        },
        tuple(characters),
        metric=metric,
        preprocessing=book.preprocessing,
        name="synthetic_multilabel",
        provenance=book.provenance,
        file_digests=book.file_digests,
    )
