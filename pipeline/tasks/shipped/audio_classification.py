"""Wav files in folders: one folder for each class, with or without a folder for each split above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.sound_file import SUFFIXES, load_sound, read_sound

from ...errors import DataError
from ...task import SplitName
from ..class_folders import class_folders, class_splits
from ..image_classification import ImageClassification
from ..input_files import FileReader


class SoundReader(FileReader):
    """Turns wav files into inputs [samples]; `preprocessing` is of kind ``"sound"``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: samples."""
        assert self.preprocessing.window is not None
        return (self.preprocessing.window,)

    def read(self, file: Path) -> NDArray[np.float32]:
        """One input, float32 [samples].

        Raises:
            InputError: it is no readable wav file.
        """
        found: NDArray[np.float32] = load_sound(file, self.preprocessing)[0]
        return found


def audio_classification(
    path: str | Path,
    rate: int = 16000,
    seconds: float = 1.0,
    *,
    labels: Sequence[str] | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    metric: str = "accuracy",
    workers: int = 4,
    memory_mb: int = 512,
) -> ImageClassification:
    """Classes by folder: ``path/CLASS/*.wav``, or ``path/train|calibration|validation|test/CLASS/*.wav``.

    The model is given sound, float32 [N, rate * seconds] in -1 ... 1: the mean of the channels, resampled to `rate`,
    the middle of what is longer, silence around what is shorter. `predict` on the device does the same by the same
    code. A spectrogram belongs into the model, such as `edgewright.models.layers.log_mel.LogMel`. What had to be
    resampled, cut or filled is counted in the report. Each file is read once before anything is trained, and again when
    it is needed.

    Args:
        path: the folder.
        rate: samples a second.
        seconds: that the model hears.
        labels: class folders in the order of the model's logits; default sorted by name.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        metric: ``accuracy`` or ``balanced_accuracy``.
        workers: threads that read files.
        memory_mb: keep the inputs of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder, a class without files, or a file that is no wav, is truncated or empty; names it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give the folder that holds one folder per class")
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1 or not 0 < rate * seconds <= 2**31:
        raise DataError(f"rate {rate!r} and seconds {seconds!r}: give samples a second, and how long the model hears")
    names, by_split = class_folders(folder, sounds_in, ("wav file", sorted(SUFFIXES)), labels)
    preprocessing = Preprocessing(kind="sound", rate=rate, window=max(1, round(rate * seconds)))
    files = [file for classes in by_split.values() for found in classes.values() for file in found]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        changes = Counter(change for found in pool.map(_changes(preprocessing), files) for change in found)
    return ImageClassification(
        class_splits(by_split, names, SoundReader(preprocessing, workers, memory_mb), fractions, seed),
        names,
        preprocessing=preprocessing,
        metric=metric,
        name=folder.name or "audio_classification",
        input_name="sound",
        provenance={"files": len(files), **dict(sorted(changes.items()))},
    )


def sounds_in(place: Path) -> Iterator[Path]:
    """Wav files below a folder, hidden ones left out, in no order."""
    for file in place.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def _changes(preprocessing: Preprocessing) -> Any:
    """What becomes of a file, in words that are counted; it is looked at whole."""

    def of(file: Path) -> list[str]:
        try:
            sound = read_sound(file)
        except InputError as error:
            raise DataError(str(error)) from None
        assert preprocessing.rate is not None and preprocessing.window is not None
        found = [] if sound.rate == preprocessing.rate else [f"resampled from {sound.rate} a second"]
        if len(sound.samples) > 1:
            found.append(f"mean of {len(sound.samples)} channels")
        length = sound.samples.shape[1] * preprocessing.rate / sound.rate - preprocessing.window
        if abs(length) >= 1:
            found.append("cut on both sides" if length > 0 else "filled with silence")
        return found

    return of
