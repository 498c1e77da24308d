"""Wav files as a network's input: one reader, for tasks and `predict` alike; NumPy alone.

Python's `wave` reads neither floats nor, before 3.12, the form in which many recorders write whole numbers.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..bundle.manifest import Preprocessing
from ..errors import InputError

SUFFIXES = frozenset((".wav",))
"""Endings of files that `load_sound` reads."""

_WHOLE, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_ZERO_CROSSINGS = 16
_AT_ONCE = 1 << 16
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Sound:
    """What a wav file holds.

    Attributes:
        rate: samples a second.
        samples: float32 [channels, samples], whole numbers scaled to -1 ... 1.
    """

    rate: int
    samples: NDArray[np.float32]


def load_sound(path: str | os.PathLike[str], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """A wav file as the network takes it: the mean of its channels, at the network's rate and length.

    Longer sound is cut on both sides, shorter is filled with silence on both sides.

    Args:
        path: of the file.
        preprocessing: of kind ``"sound"``.

    Returns:
        float32 [1, window].

    Raises:
        InputError: another kind of preprocessing, or what `read_sound` refuses.
    """
    rate, window = preprocessing.rate, preprocessing.window
    if preprocessing.kind != "sound" or rate is None or window is None:
        raise InputError(f"{path} is a sound, and the bundle does not say how sounds become its input: give a .npy")
    sound = read_sound(Path(path))
    found = resampled(sound.samples.mean(axis=0, dtype=np.float64), sound.rate, rate)
    first, missing = max(0, len(found) - window) // 2, max(0, window - len(found))
    found = np.pad(found[first : first + window], (missing // 2, missing - missing // 2))
    return np.ascontiguousarray(found[None], np.float32)


def read_sound(file: Path) -> Sound:
    """All of a wav file: whole numbers of 8, 16, 24 or 32 bits, floats of 32 or 64.

    Raises:
        InputError: it cannot be read, is no wav file of these, is truncated or empty, or holds what is not finite.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file} has more than {_MOST_BYTES >> 20} MiB: cut it into pieces")
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise InputError(f"{file} is no wav file: convert it to one")
    chunks: dict[bytes, bytes] = {}
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        content = data[place + 8 : place + 8 + size]
        if name == b"data" and len(content) < size:
            raise InputError(f"{file} says that it has {size} bytes of sound and holds {len(content)}: get it again")
        chunks.setdefault(name, content)
        place += 8 + size + size % 2
    if b"fmt " not in chunks or b"data" not in chunks or len(chunks[b"fmt "]) < 16:
        raise InputError(f"{file} is a wav file without a form or without sound: get it again")
    return _decoded(file, chunks[b"fmt "], chunks[b"data"])


def _decoded(file: Path, form: bytes, data: bytes) -> Sound:
    code, channels = (int.from_bytes(form[at : at + 2], "little") for at in (0, 2))
    rate, bits = int.from_bytes(form[4:8], "little"), int.from_bytes(form[14:16], "little")
    if code == _EXTENSIBLE and len(form) >= 26:
        code = int.from_bytes(form[24:26], "little")
    known = {(_WHOLE, 8), (_WHOLE, 16), (_WHOLE, 24), (_WHOLE, 32), (_FLOAT, 32), (_FLOAT, 64)}
    if (code, bits) not in known or not channels or not rate:
        raise InputError(
            f"{file} has form {code} with {bits} bits, {channels} channels and {rate} samples a second; whole numbers "
            "of 8, 16, 24 or 32 bits and floats of 32 or 64 are read: convert it"
        )
    whole = len(data) - len(data) % (channels * bits // 8)
    if not whole:
        raise InputError(f"{file} holds no sound: remove it")
    if code == _FLOAT:
        values = np.frombuffer(data[:whole], f"<f{bits // 8}").astype(np.float64)
        if not np.isfinite(values).all():
            raise InputError(f"{file} holds NaN or infinity at sample {int((~np.isfinite(values)).argmax())}: clean it")
    elif bits == 8:
        values = (np.frombuffer(data[:whole], np.uint8).astype(np.float64) - 128.0) / 128.0
    elif bits == 24:
        parts = np.frombuffer(data[:whole], np.uint8).reshape(-1, 3).astype(np.int32)
        values = ((parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24) >> 8) / float(1 << 23)
    else:
        values = np.frombuffer(data[:whole], f"<i{bits // 8}") / float(1 << (bits - 1))
    return Sound(rate, np.ascontiguousarray(values.reshape(-1, channels).T, np.float32))


def resampled(samples: NDArray[np.float64], rate: int, wanted: int) -> NDArray[np.float64]:
    """The same sound with `wanted` samples a second: an ideal low pass under a Hann window, 16 zero crossings a side.

    Args:
        samples: [len].
        rate: samples a second that it has.
        wanted: that it gets; what lies above half of the smaller of both is removed.
    """
    if rate == wanted:
        return samples
    up, down = wanted // math.gcd(rate, wanted), rate // math.gcd(rate, wanted)
    weights = _filters(up, down)
    side = weights.shape[1] // 2
    padded = np.pad(samples, (side, side))
    count = -(-len(samples) * up // down)
    windows = sliding_window_view(padded, weights.shape[1])
    found = np.empty(count)
    for start in range(0, count, _AT_ONCE):
        output = np.arange(start, min(count, start + _AT_ONCE))
        first, phase = output * down // up, output * down % up
        found[output] = np.einsum("nk,nk->n", windows[first], weights[phase])
    return found


@functools.lru_cache(maxsize=8)
def _filters(up: int, down: int) -> NDArray[np.float64]:
    """For each phase between two samples the weights of the samples around it, [up, even number]."""
    cut = min(1.0, up / down)
    side = math.ceil(_ZERO_CROSSINGS / cut)
    # the window of the output that lies `phase / up` behind sample s begins at s - side
    distance = np.arange(-side, side + 1)[None] - (np.arange(up) / up)[:, None]
    inside = np.abs(distance) <= side
    weights = np.where(inside, np.sinc(cut * distance) * (0.5 + 0.5 * np.cos(np.pi * distance / side)), 0.0)
    found: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return found
