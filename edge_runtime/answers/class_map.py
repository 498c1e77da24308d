"""A class for each pixel: the kind ``class_map``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec
from ..errors import InputError
from ..process.plain_text import printable
from .kind import ArgMax, Meaning, Outputs, blanked, label_name, with_overflown

if TYPE_CHECKING:
    from PIL import Image

CLASS_MAP = "class_map"

_SHOWN = 5
_MOST_CLASSES = 255
_REFUSED = 255


class ClassMap(NamedTuple):
    """A class for every pixel; of the kind ``class_map``.

    Attributes:
        label: int64 [N, H, W]; -1 for a row that was refused.
        probability: float32 [N, H, W], of that class; NaN for a row that was refused.
        labels: names of the classes, empty if the manifest has none.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    label: NDArray[np.int64]
    probability: NDArray[np.float32]
    labels: tuple[str, ...] = ()
    refused: Mapping[int, str] = MappingProxyType({})

    def shares(self, row: int) -> dict[str, float]:
        """Name of every class in the map of `row` -> its share of the pixels, the largest first."""
        found, counts = np.unique(self.label[row], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {label_name(int(found[i]), self.labels): float(counts[i]) / self.label[row].size for i in order}

    @property
    def rows(self) -> int:
        """N."""
        return len(self.label)

    def text(self, row: int) -> str:
        """The classes with the largest shares."""
        shares = self.shares(row)
        shown = ", ".join(f"{printable(name)} {share:.1%}" for name, share in list(shares.items())[:_SHOWN])
        more = f", {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else ""
        return f"{shown}{more}  of {' x '.join(map(str, self.label[row].shape))} pixels"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        shares = [{} if row in self.refused else self.shares(row) for row in range(len(self.label))]
        return {"label": self.label.tolist(), "labels": list(self.labels), "shares": shares}

    def drawn(self, pictures: NDArray[np.uint8] | None) -> Image.Image:
        """The maps of all rows below each other; the palette index is the class.

        Raises:
            InputError: more classes than a palette has.
        """
        from PIL import Image

        del pictures  # a map is a picture of its own
        largest = int(self.label.max(initial=0))
        if largest >= _MOST_CLASSES:
            raise InputError(f"the class {largest} has no place in a palette of {_MOST_CLASSES}: use --json instead")
        pixels = np.where(self.label < 0, _REFUSED, self.label).astype(np.uint8)
        image = Image.fromarray(pixels.reshape(-1, pixels.shape[-1])).convert("L")
        image.putpalette(palette().ravel().tolist())
        return image


class ClassMapKind(ArgMax):
    """One class for each pixel: logits [N, C, H, W]."""

    name = CLASS_MAP
    class_axis = 1
    axes = (4,)
    form = "logits [N, C, H, W]"
    draws = True

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> ClassMap:
        """Label and probability of every pixel."""
        logits = outputs[spec.name].astype(np.float32, copy=False)
        refused = with_overflown(logits, refused, meaning)
        top = logits.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            probability = np.asarray(1.0 / np.exp(logits - top).sum(axis=1), np.float32)
        label = np.asarray(logits.argmax(axis=1), np.int64)
        return ClassMap(blanked(label, refused, -1), blanked(probability, refused, np.nan), spec.labels, refused)


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
