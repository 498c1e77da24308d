"""Folders of wav files: what is read and said, what is refused, and that the made-up sounds need their course."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from wav_files import tone, write

from edgewright.edge_runtime import load_sound
from edgewright.models.layers.log_mel import LogMel
from edgewright.pipeline.errors import DataError, EditedSourceError
from edgewright.pipeline.tasks.shipped.audio_classification import audio_classification
from edgewright.pipeline.tasks.shipped.synthetic_audio import synthetic_audio


def folders(place: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name in ("bird", "dog"):
        (place / name).mkdir(parents=True)
        for number in range(count):
            write(place / name / f"{number}.wav", 0.1 * rng.normal(size=(1, 1200)))
    return place


def test_files_are_read_as_on_the_device_and_changes_are_said(tmp_path: Path) -> None:
    place = folders(tmp_path / "sounds")
    write(place / "dog" / "other.wav", np.stack([tone(440, 44100, 0.1), tone(300, 44100, 0.1)]), rate=44100)
    task = audio_classification(place, rate=8000, seconds=0.125)
    assert task.labels == ("bird", "dog") and task.input_names == ("sound",)
    assert task.provenance == {
        "files": 25,
        "cut on both sides": 24,
        "filled with silence": 1,
        "mean of 2 channels": 1,
        "resampled from 44100 a second": 1,
    }
    for split in task.splits.values():
        batch = split.batch(range(len(split)))
        assert batch.inputs[0].shape == (len(split), 1000) and batch.inputs[0].dtype == torch.float32
        for row, file in enumerate(split.files):  # type: ignore[attr-defined]
            assert np.array_equal(batch.inputs[0][row].numpy(), load_sound(file, task.preprocessing)[0])
            assert task.labels[int(batch.targets[row])] == file.parent.name


def test_what_cannot_be_right_is_refused_before_training(tmp_path: Path) -> None:
    place = folders(tmp_path / "sounds")
    with pytest.raises(DataError, match="there is no folder"):
        audio_classification(tmp_path / "none")
    with pytest.raises(DataError, match="rate 0 and seconds"):
        audio_classification(place, rate=0)
    (place / "cat").mkdir()
    with pytest.raises(DataError, match=r"class 'cat' has no wav file in .*\.wav"):
        audio_classification(place)
    (place / "cat" / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"a\.wav is no wav file"):
        audio_classification(place)


def test_a_file_that_is_edited_stops_the_run(tmp_path: Path) -> None:
    task = audio_classification(folders(tmp_path / "sounds"), rate=8000, seconds=0.1, memory_mb=0)
    split = task.splits["train"]
    file = split.files[0]  # type: ignore[attr-defined]
    write(file, np.zeros((1, 900)))
    with pytest.raises(EditedSourceError, match=file.name):
        split.batch([0])


def test_neither_loudness_nor_mean_pitch_tells_the_made_up_sounds() -> None:
    """The means over time of log-mel bands, and a least squares fit to the classes."""
    task = synthetic_audio(rows=600)
    layer = LogMel(8000, 256, 128, 24)
    found = []
    for name in ("train", "test"):
        sound = task.splits[name].batch(range(len(task.splits[name]))).inputs[0]
        assert sound.shape[1] == 4000 and float(sound.abs().max()) < 4.0
        means = layer(sound).mean(dim=2).double()
        found.append(torch.cat([means, torch.ones(len(means), 1)], dim=1))
    wanted = torch.nn.functional.one_hot(task.splits["train"].targets, 6).double()
    weights = torch.linalg.lstsq(found[0], wanted).solution
    right = (found[1] @ weights).argmax(dim=1) == task.splits["test"].targets
    assert 0.2 < float(right.double().mean()) < 0.75
