"""Reads image files, in training and on the device alike: this is the only place that does. Needs Pillow.

What becomes of a file:

- Orientation: turned as its EXIF tag says, as viewers show it. (TIFF: Pillow itself turns it, always.)
- Colour: palette, CMYK, YCbCr, HSV and bilevel become RGB, or grey with one channel; grey becomes RGB by repeating it.
- Alpha and transparent palette entries are dropped, not composited: what lies under a transparent pixel counts.
- Frames: of an animation, a multi-page or multi-picture file the first; many phones write photographs with two.
- Depth: 8 bits as they are. Deeper grey files (12, 16 and 32 bits, float) only where ``Preprocessing.max_value`` says
  which value stands for white. Deeper colour files in their upper 8 bits, Pillow keeps no more.
- Refused by name: what is truncated, damaged or no image, what is so large that it looks like an attack (Pillow's
  limit), and pixels outside 0 ... `max_value`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import IGNORED, Preprocessing
from ..errors import InputError
from .preprocess import outside_range, preprocess_image

if TYPE_CHECKING:
    from PIL import Image as _Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
"""Endings of image files, in lower case."""

_DEEP_SUFFIXES = frozenset({".png", ".ppm", ".pgm", ".tif", ".tiff"})
"""Endings of files whose pixels may have more than 8 bits."""

_ORIENTATION = 0x0112
"""The EXIF tag."""


@dataclass(frozen=True)
class Depth:
    """What the header of an image file says of its pixels."""

    white: float | None
    """The value that stands for white: 255 with 8 bits; None: the file does not say."""
    text: str
    """For messages, e.g. ``"16-bit"``."""


def load_image(path: str | os.PathLike[str], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """An image file as the network takes it: `read_image`, then `preprocess_image`.

    Args:
        path: of the file.
        preprocessing: of kind ``"image"``.

    Returns:
        float32 [1, channels, height, width].

    Raises:
        InputError: Pillow is not installed, or the file cannot be read as the preprocessing wants it; names the file.
    """
    return preprocess_image(read_image(path, preprocessing), preprocessing)


def read_image(path: str | os.PathLike[str], preprocessing: Preprocessing) -> NDArray[Any]:
    """The pixels of an image file, in the form that `preprocess_image` takes; see the head of this module.

    Args:
        path: of the file.
        preprocessing: its `channels`, `max_value` and `orientation` count.

    Returns:
        [H, W, channels], uint8; for deep files uint16, or int32 where `max_value` is larger, or float32.

    Raises:
        InputError: Pillow is not installed, or the file cannot be read as the preprocessing wants it; names the file.
    """
    path = Path(path)
    image_module = _pillow(path)
    try:
        with image_module.open(path) as image:
            depth = _depth(image)
            if _is_deep(image) and preprocessing.max_value is None:
                raise InputError(
                    f"{path} has {depth.text} pixels, and 8 bits are expected: convert it to 8 bits, or have the model "
                    "trained with `max_value`, the value that stands for white in such files"
                )
            image.load()
            turn = 1 if preprocessing.orientation == IGNORED else _orientation(image)
            if _is_deep(image):
                assert preprocessing.max_value is not None
                pixels = _deep_pixels(image, depth, preprocessing.max_value)
            else:
                pixels = _byte_pixels(image, preprocessing.channels)
    except InputError:
        raise
    except Exception as error:  # decoders of foreign bytes: whatever they raise, it is the file that is at fault
        raise _unreadable(path, error) from error
    largest = preprocessing.max_value
    if largest is not None and (reason := outside_range(pixels, largest)):
        raise InputError(f"{path} has {reason}: give another `max_value`, or take the file out")
    if pixels.dtype == np.int64:
        pixels = pixels.astype(np.int32 if largest is not None and largest > 65535 else np.uint16)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], preprocessing.channels, axis=2)
    return _upright(pixels, turn)


def read_depth(path: str | os.PathLike[str]) -> Depth:
    """What the file's header says of its pixels; nothing is decoded, and formats that know 8 bits alone are not opened.

    Raises:
        InputError: Pillow is not installed, or the file is no image; names it.
    """
    path = Path(path)
    if path.suffix.lower() not in _DEEP_SUFFIXES:
        return _BYTES
    image_module = _pillow(path)
    try:
        with image_module.open(path) as image:
            return _depth(image)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def describe(path: str | os.PathLike[str]) -> tuple[str, int, NDArray[np.float32] | None]:
    """What a person would want to know of an image file that `read_image` has read.

    Returns:
        format, mode and size as stored, in words; the orientation, 1 to 8; how opaque each pixel is, [H, W] from 0 to
        1, upright, or None where all of them are.

    Raises:
        InputError: as `read_depth`.
    """
    path = Path(path)
    image_module = _pillow(path)
    try:
        with image_module.open(path) as image:
            text = f"{image.format}, mode {image.mode}, {image.height} x {image.width}"
            image.load()
            turn = _orientation(image)
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            alpha = np.asarray(image.convert("RGBA").getchannel("A"), np.float32) / 255 if has_alpha else None
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return text, turn, None if alpha is None or alpha.min() == 1 else _upright(alpha, turn)


_BYTES = Depth(255.0, "8-bit")


def _pillow(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            f"reading {path} needs Pillow, which is not installed: install pillow, or save the pixels as "
            "a uint8 [H, W, C] .npy"
        ) from None
    return Image


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(f"{path} cannot be read as an image ({reason}); repair it or remove it")


def _is_deep(image: _Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _depth(image: _Image.Image) -> Depth:
    """To be asked before the image is loaded: how it is stored is forgotten then."""
    if not _is_deep(image):
        return _BYTES
    if image.mode == "F":
        return Depth(None, "floating-point")
    tile: Any = getattr(image, "tile", None)
    how: Any = tile[0][3] if tile else ()
    how = how if isinstance(how, tuple) else (how,)
    if image.format == "PPM":
        # the decoder's last argument is what the header calls white, unless all 16 bits are used
        white = float(how[-1]) if how and isinstance(how[-1], int) and how[-1] > 1 else 65535.0
        return Depth(white, f"16-bit (white is {white:g})")
    if how and how[0] == "I;12":
        return Depth(4095.0, "12-bit")
    # older releases of Pillow read PNG as 32 bits
    if image.mode.startswith("I;16") or image.format == "PNG":
        return Depth(65535.0, "16-bit")
    return Depth(None, "32-bit or signed 16-bit")


def _deep_pixels(image: _Image.Image, depth: Depth, max_value: float) -> NDArray[Any]:
    """[H, W] in units of `max_value`, not held against it: int64 or float32."""
    if image.mode == "F":
        return np.asarray(image).astype(np.float32)
    pixels = np.asarray(image).astype(np.int64)
    white = depth.white
    if white is None:
        return pixels
    if image.format == "PPM":
        pixels = np.rint(pixels * (white / 65535)).astype(np.int64)  # undoes Pillow's stretching to 16 bits
    if white < max_value:
        pixels = np.rint(pixels * (max_value / white)).astype(np.int64)  # fewer bits: white stays white
    return pixels


def _byte_pixels(image: _Image.Image, channels: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], or [H, W] with one channel."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this way with a warning
    elif image.mode == "LAB":
        image = image.convert("RGB")  # there is no direct way to grey
    return np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)


def _orientation(image: _Image.Image) -> int:
    """1 to 8; 1, as stored, where the tag is missing or its block is damaged, as viewers have it."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # any damage to a block of foreign bytes that says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """[H, W, C] as it is meant to be seen."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    turns = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    return np.ascontiguousarray(np.rot90(pixels, turns))
