"""Log-mel spectrogram of sound as plain products, so that it lies inside an exported graph (`torch.stft` does not)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogMel(nn.Module):
    """Natural logarithm of the mel power spectrogram of a periodic Hann window; no padding at the ends.

    Args:
        rate: samples a second.
        size: samples of a frame, which the Fourier transform takes.
        step: samples from one frame to the next.
        bands: mel bands, of the HTK scale, from 0 Hz to half the rate.
        floor: the least power that a logarithm is taken of.

    Raises:
        ValueError: a number is not positive, or so many bands that one holds no frequency.
    """

    basis: Tensor
    mel: Tensor

    def __init__(self, rate: int, size: int = 512, step: int = 160, bands: int = 40, floor: float = 1e-6) -> None:
        super().__init__()
        if min(rate, size, step, bands) < 1 or floor <= 0.0:
            raise ValueError(f"rate {rate}, size {size}, step {step}, bands {bands}, floor {floor}: all are positive")
        self.step, self.floor, self.frequencies = step, floor, size // 2 + 1
        time = torch.arange(size, dtype=torch.float64)
        # (k * t) mod size before the product: the angle stays exact
        turns = torch.outer(torch.arange(self.frequencies, dtype=torch.float64), time) % size
        angle = 2.0 * math.pi * turns / size
        window = torch.hann_window(size, periodic=True, dtype=torch.float64)
        waves = torch.cat([angle.cos(), -angle.sin()]) * window
        # a basis is no weight: it takes no part in training, sharing or pruning
        self.register_buffer("basis", waves[:, None].float(), persistent=False)
        self.register_buffer("mel", mel_bands(rate, size, bands)[:, :, None].float(), persistent=False)

    def forward(self, sound: Tensor) -> Tensor:
        """Of sound float32 [N, samples] the spectrogram [N, bands, frames], ``1 + (samples - size) // step`` frames."""
        parts = nn.functional.conv1d(sound[:, None], self.basis, stride=self.step)
        real, imaginary = parts[:, : self.frequencies], parts[:, self.frequencies :]
        power = real * real + imaginary * imaginary
        return nn.functional.conv1d(power, self.mel).clamp_min(self.floor).log()


def mel_bands(rate: int, size: int, bands: int) -> Tensor:
    """Triangles of height 1 over the frequencies of a Fourier transform, float64 [bands, size // 2 + 1].

    Args:
        rate: samples a second.
        size: samples of a frame.
        bands: their number; corners are evenly spaced on the HTK mel scale, ``2595 log10(1 + f / 700)``.

    Raises:
        ValueError: a band lies between two frequencies and would always be silent.
    """
    top = 2595.0 * math.log10(1.0 + rate / 2.0 / 700.0)
    corners = 700.0 * (10.0 ** (torch.linspace(0.0, top, bands + 2, dtype=torch.float64) / 2595.0) - 1.0)
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    found = torch.minimum(rising, falling).clamp_min(0.0)
    silent = (found.sum(dim=1) == 0).nonzero().flatten().tolist()
    if silent:
        raise ValueError(
            f"band {silent[0]} of {bands} holds none of the {size // 2 + 1} frequencies: fewer bands or a larger size"
        )
    return found
