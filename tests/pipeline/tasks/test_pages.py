"""Characters on pages: masks, boxes and labels say the same."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.shipped.pages import NO_BOX, draw_book


def test_masks_boxes_and_labels_agree() -> None:
    pages = draw_book(rows={"train": 80}, size=32, characters="AKX", most=3).pages["train"]
    assert pages.images.shape == (80, 32, 32, 1) and pages.images.dtype == np.uint8
    for mask, boxes, present in zip(pages.masks, pages.boxes, pages.present, strict=True):
        real = boxes[boxes[:, 0] != NO_BOX]
        assert set(np.unique(mask)) - {0} == {int(c) + 1 for c in real[:, 0]} == set(np.flatnonzero(present) + 1)
        inside = np.zeros_like(mask, bool)
        for _, left, top, right, bottom in real.astype(int):
            assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32
            inside[top:bottom, left:right] = True
        assert not mask[~inside].any(), "every pixel of a character lies in a box"


def test_splits_share_no_font_and_a_seed_is_the_same_pages() -> None:
    rows = {"train": 12, "validation": 4, "test": 4}
    one, two = (draw_book(rows=rows, size=24) for _ in range(2))
    assert all((one.pages[name].images == two.pages[name].images).all() for name in rows)
    fonts = [set(one.provenance["fonts"][name]) for name in rows]
    assert not fonts[0] & fonts[1] and not fonts[0] & fonts[2] and not fonts[1] & fonts[2]
    assert (draw_book(1, rows, 24).pages["train"].images != one.pages["train"].images).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "at least 16"),
        ({"characters": "AA"}, "two or more different"),
        ({"most": 0}, "1 to 32"),
        ({"rows": {"test": 3}}, "lack 'train'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw_book(**options)
