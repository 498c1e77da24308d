"""The log-mel layer is what `torch.stft` gives, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from edgewright.models.layers.log_mel import LogMel, mel_bands


def _by_stft(sound: torch.Tensor) -> torch.Tensor:
    window = torch.hann_window(256, dtype=torch.float64)
    found = torch.stft(sound.double(), 256, 80, window=window, center=False, return_complex=True)
    return (mel_bands(8000, 256, 20) @ found.abs().square()).clamp_min(1e-6).log()


def _sound() -> torch.Tensor:
    time = torch.arange(4000) / 8000
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.sin(2 * torch.pi * 1000 * time), 0.1 * noise, torch.zeros(4000)])


def test_it_is_what_stft_gives() -> None:
    found = LogMel(8000, 256, 80, 20)(_sound())
    assert found.shape == (3, 20, 1 + (4000 - 256) // 80)
    torch.testing.assert_close(found.double(), _by_stft(_sound()), rtol=0, atol=2e-3)
    loudest = mel_bands(8000, 256, 20)[:, 32].argmax()  # 1000 Hz is frequency 32 of 256 at 8 kHz
    assert (found[0].argmax(dim=0) == loudest).all()


def test_it_is_what_transformers_gives() -> None:
    bands = mel_filter_bank(129, 20, 0.0, 4000.0, 8000, norm=None, mel_scale="htk")
    window = window_function(256, "hann", periodic=True)
    for row, sound in enumerate(_sound().numpy()):
        theirs = spectrogram(
            sound, window, 256, 80, power=2.0, center=False, mel_filters=bands, mel_floor=1e-6, log_mel="log"
        )
        np.testing.assert_allclose(LogMel(8000, 256, 80, 20)(_sound())[row].numpy(), theirs, rtol=0, atol=3e-3)


@pytest.mark.slow
def test_it_exports_and_onnx_runtime_agrees(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    layer = LogMel(8000, 256, 80, 20).eval()
    torch.onnx.export(layer, (_sound(),), str(file), dynamo=True, verbose=False)
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {"sound": _sound().numpy()})
    np.testing.assert_allclose(found, _by_stft(_sound()).numpy(), rtol=0, atol=2e-3)


def test_bands_without_a_frequency_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer bands or a larger size"):
        LogMel(16000, 128, 80, 80)
