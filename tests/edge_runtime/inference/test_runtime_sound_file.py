"""Wav files: every form gives the same sound, another rate the same tone, and what is damaged is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from wav_files import tone, write

from edgewright.edge_runtime import InputError
from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.inference.sound_file import load_sound, read_sound, resampled


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("form", ["i8", "i16", "i24", "i32", "f32", "f64"])
def test_every_form_gives_the_same_sound(form: str, extensible: bool, tmp_path: Path) -> None:
    both = np.stack([tone(440, 8000), -tone(300, 8000)])
    found = read_sound(write(tmp_path / "a.wav", both, form=form, extensible=extensible))
    assert found.rate == 8000 and found.samples.shape == (2, 4000)
    np.testing.assert_allclose(found.samples, both, atol={"i8": 8e-3, "i16": 5e-5}.get(form, 1e-6))


@pytest.mark.parametrize(
    ("rate", "wanted"), [(44100, 16000), (8000, 16000), (48000, 16000), (22050, 8000), (16000, 16000)]
)
def test_another_rate_gives_the_same_tone(rate: int, wanted: int) -> None:
    found, right = resampled(tone(440, rate), rate, wanted), tone(440, wanted)
    assert len(found) == len(right)
    middle = slice(wanted // 20, -wanted // 20)
    np.testing.assert_allclose(found[middle], right[middle], atol=2e-3)
    noise = np.random.default_rng(0).normal(size=rate // 2)
    theirs = scipy.signal.resample_poly(noise, wanted // np.gcd(rate, wanted), rate // np.gcd(rate, wanted))
    assert np.corrcoef(resampled(noise, rate, wanted)[middle], theirs[middle])[0, 1] > 0.99


def test_what_lies_above_the_new_rate_is_removed_and_not_folded_down() -> None:
    high = resampled(tone(7000, 44100), 44100, 8000)
    assert np.abs(high[400:-400]).max() < 2e-3


def test_the_middle_is_taken_and_silence_is_put_around(tmp_path: Path) -> None:
    samples = np.arange(10)[None] / 16.0
    file = write(tmp_path / "a.wav", np.concatenate([samples, samples]), form="f32")
    for window, expected in ((4, [3, 4, 5, 6]), (13, [0, *range(10), 0, 0])):
        found = load_sound(file, Preprocessing(kind="sound", rate=8000, window=window))
        assert found.dtype == np.float32 and (found[0] * 16).tolist() == expected


def test_what_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.wav", tone(440, 8000)[None]).read_bytes()
    bad = tmp_path / "b.wav"
    nan = write(tmp_path / "n.wav", np.array([[0.0, np.nan]]), form="f32").read_bytes()
    empty = write(tmp_path / "e.wav", np.zeros((1, 0))).read_bytes()
    coded = whole.replace(struct.pack("<HH", 1, 1), struct.pack("<HH", 0x55, 1), 1)
    for content, message in (
        (b"", "is no wav file"),
        (b"ID3" + whole, "is no wav file"),
        (whole[:-10], r"says that it has 8000 bytes of sound and holds 7990"),
        (whole[:30], "without a form or without sound"),
        (nan, "holds NaN or infinity at sample 1"),
        (empty, "holds no sound"),
        (coded, "has form 85 with 16 bits"),
    ):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=rf"b\.wav.*{message}"):
            read_sound(bad)
    with pytest.raises(InputError, match=r"cannot read .*none\.wav"):
        read_sound(tmp_path / "none.wav")
    with pytest.raises(InputError, match="does not say how sounds become its input"):
        load_sound(tmp_path / "a.wav", Preprocessing())
