"""An image for each row: the kind ``image``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AnswerSpec, TensorSpec
from .kind import Kind, Meaning, Outputs, blanked, json_numbers, with_overflown

if TYPE_CHECKING:
    from PIL import Image

IMAGE = "image"


class Restored(NamedTuple):
    """Images that were computed; of the kind ``image``.

    Attributes:
        pixels: float32 [N, C, H, W], 0 (black) to 1 (white), what lay beyond cut off; NaN for a row that was refused.
        refused: row -> why it has no answer; such a row changes nothing in the others.
    """

    pixels: NDArray[np.float32]
    refused: Mapping[int, str] = MappingProxyType({})

    @property
    def rows(self) -> int:
        """N."""
        return len(self.pixels)

    def text(self, row: int) -> str:
        """Size and brightness."""
        channels, height, width = self.pixels.shape[1:]
        what = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
        return f"an image of {height} x {width} pixels, {what}, mean {float(self.pixels[row].mean()):.3f}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {"pixels": json_numbers(self.pixels)}

    def drawn(self, pictures: NDArray[np.uint8] | None) -> Image.Image:
        """The images of all rows below each other, 8 bits a channel; rows that were refused are black."""
        from PIL import Image

        del pictures  # the answer is a picture of its own
        whole = np.rint(255.0 * np.nan_to_num(self.pixels)).astype(np.uint8).transpose(0, 2, 3, 1)
        below = whole.reshape(-1, *whole.shape[2:])
        return Image.fromarray(below if below.shape[2] == 3 else below[:, :, 0])


class ImageKind(Kind):
    """Pixels [N, C, H, W], 1 or 3 channels, 0 to 1."""

    name = IMAGE
    draws = True

    def predict(self, spec: AnswerSpec, outputs: Outputs, refused: dict[int, str], meaning: Meaning) -> Restored:
        """The images, cut off at black and white."""
        pixels = outputs[spec.name].astype(np.float32, copy=False)
        refused = with_overflown(pixels, refused, meaning)
        with np.errstate(invalid="ignore"):
            return Restored(blanked(np.clip(pixels, 0.0, 1.0), refused, np.nan), refused)

    def unfit(self, spec: AnswerSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
        """No image's axes or channels."""
        shape = tensors[spec.name].shape
        if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] not in (1, 3)):
            return f"the output {spec.name!r} has the shape {list(shape)}, and images are [N, 1 or 3, H, W]"
        return super().unfit(spec, tensors)
