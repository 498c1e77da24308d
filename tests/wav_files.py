"""Wav files of every form, and tones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write(
    file: Path, samples: NDArray[np.float64], rate: int = 8000, form: str = "i16", extensible: bool = False
) -> Path:
    """`samples` [channels, len] as a wav file."""
    bits = int(form[1:])
    flat = np.ascontiguousarray(samples.T).ravel()
    if form[0] == "f":
        data = flat.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = (np.rint(flat * 127) + 128).astype(np.uint8).tobytes()
    elif bits == 24:
        whole = np.rint(flat * (2**23 - 1)).astype("<i4")
        data = whole.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    else:
        data = np.rint(flat * (2.0 ** (bits - 1) - 1)).astype(f"<i{bits // 8}").tobytes()
    code, channels = 3 if form[0] == "f" else 1, len(samples)
    head = struct.pack(
        "<HHIIHH",
        0xFFFE if extensible else code,
        channels,
        rate,
        rate * channels * bits // 8,
        channels * bits // 8,
        bits,
    )
    if extensible:
        head += struct.pack("<HHIH", 22, bits, 0, code) + bytes(14)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + odd + b"data" + struct.pack("<I", len(data)) + data
    file.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return file


def tone(hertz: float, rate: int, seconds: float = 0.5) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
