"""Folders of files, one for each class, with or without a folder for each split above."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgewright.models.sources.python_source import did_you_mean

from ..errors import DataError
from ..task import SPLITS, SplitName
from .input_files import FileReader, FileSplit
from .splitting import stratified_split

_SPLIT_FOLDERS: dict[str, SplitName] = {
    **{name: name for name in SPLITS},
    "val": "validation",
    "valid": "validation",
}


def class_folders(
    folder: Path,
    files_in: Callable[[Path], Iterable[Path]],
    kind: tuple[str, Sequence[str]],
    labels: Sequence[str] | None,
) -> tuple[list[str], dict[SplitName, dict[str, list[Path]]]]:
    """What ``folder/CLASS/*`` or ``folder/SPLIT/CLASS/*`` holds.

    Args:
        folder: the folder.
        files_in: the files of a class below its folder.
        kind: what such a file is, and its endings; for messages.
        labels: names of the classes in the order of the logits; None: sorted.

    Returns:
        Names of the classes; split -> class -> files, everything in ``train`` where there are no split folders.

    Raises:
        DataError: no class folders, one that `labels` lacks, a class without files, or a folder beside the splits.
    """
    presplit = _split_folders(folder)
    found = {name: _classes_in(place, files_in) for name, place in (presplit or {"train": folder}).items()}
    return _labels(found, labels, folder, kind), found


def class_splits(
    by_split: Mapping[SplitName, Mapping[str, list[Path]]],
    names: Sequence[str],
    reader: FileReader,
    fractions: Mapping[SplitName, float] | None,
    seed: int,
) -> dict[SplitName, FileSplit]:
    """The splits; those that have no folder are cut out of train, by `seed` and content.

    Args:
        by_split: of `class_folders`.
        names: of the classes.
        reader: of the files.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.

    Raises:
        DataError: shares that make no sense.
    """
    samples = {name: _samples(classes, names) for name, classes in by_split.items()}
    shares: dict[SplitName, float] = dict(
        fractions or {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}
    )
    if samples.keys() == {"train"}:
        samples = _dealt_out(samples["train"], names, shares, seed, reader)
    elif "train" in samples and not samples.keys() >= shares.keys():
        cut: dict[SplitName, float] = {n: s for n, s in shares.items() if n == "train" or n not in samples}
        if "train" not in cut:
            raise DataError(f"fractions {shares} lack 'train', out of which {', '.join(cut)} is to be cut")
        samples.update(_dealt_out(samples["train"], names, cut, seed, reader))
    return {name: _files(rows, reader) for name, rows in samples.items()}


@dataclass(frozen=True)
class _Sample:
    file: Path
    target: int


def _folders(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _split_folders(folder: Path) -> dict[SplitName, Path]:
    """Split -> its folder; empty if the folders are classes.

    A class may be called "train": only a folder of folders is a split.
    """
    inside = _folders(folder)
    found = {_SPLIT_FOLDERS[p.name]: p for p in inside if p.name in _SPLIT_FOLDERS and _folders(p)}
    if not found:
        return {}
    for place in inside:
        if found.get(_SPLIT_FOLDERS.get(place.name, "train")) != place:
            raise DataError(
                f"{folder} holds the split folder {next(iter(found.values())).name!r} and beside it "
                f"{place.name!r}"
                f"{did_you_mean(place.name, list(SPLITS))}, which is none or holds no class folders: use "
                f"{', '.join(SPLITS)}, each with one folder per class, or class folders only"
            )
    return {name: found[name] for name in SPLITS if name in found}


def _classes_in(place: Path, files_in: Callable[[Path], Iterable[Path]]) -> dict[str, list[Path]]:
    return {entry.name: sorted(files_in(entry)) for entry in _folders(place)}


def _labels(
    by_split: Mapping[SplitName, Mapping[str, list[Path]]],
    labels: Sequence[str] | None,
    folder: Path,
    kind: tuple[str, Sequence[str]],
) -> list[str]:
    """Class names in the order of the logits; refuses classes without samples."""
    found = sorted({name for classes in by_split.values() for name in classes})
    if not found:
        raise DataError(f"{folder} holds no class folders: put the {kind[0]}s of each class into a folder of its own")
    names = found if labels is None else [str(label) for label in labels]
    for name in found:
        if name not in names:
            raise DataError(
                f"{folder} has a folder for the class {name!r}{did_you_mean(name, names)}, which labels lacks"
            )
    for split, classes in by_split.items():
        for name in names:
            if not classes.get(name) and (name in classes or split == "train"):
                raise DataError(
                    f"class {name!r} has no {kind[0]} in {folder} (split {split!r}): add files "
                    f"({', '.join(kind[1])}), or remove the class"
                )
    return names


def _files(samples: Sequence[_Sample], reader: FileReader) -> FileSplit:
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    return FileSplit([sample.file for sample in samples], targets, reader)


def _samples(classes: Mapping[str, list[Path]], names: Sequence[str]) -> list[_Sample]:
    return [_Sample(file, target) for target, name in enumerate(names) for file in classes.get(name, [])]


def _dealt_out(
    samples: Sequence[_Sample],
    names: Sequence[str],
    fractions: Mapping[SplitName, float],
    seed: int,
    reader: FileReader,
) -> dict[SplitName, list[_Sample]]:
    targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    digests = reader.digests([sample.file for sample in samples])
    rows = stratified_split(digests, targets, names, fractions, seed)
    return {name: [samples[row] for row in chosen] for name, chosen in rows.items()}
