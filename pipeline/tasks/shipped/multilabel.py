"""Image files with any number of labels each: a folder, and a CSV file that says which image shows what."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError
from ...task import SPLITS, Batch, SplitName
from ..array_task import Augmentation
from ..image_files import ImageReader, check_image_arguments, common_white, image_preprocessing
from ..input_files import FileSplit
from ..multilabel import MultiLabel
from ..splitting import stratified_split
from .augmentation import flip_and_crop

_YES, _NO = frozenset(("1", "1.0", "true", "yes")), frozenset(("0", "0.0", "false", "no", ""))


def multilabel(
    path: str | Path,
    csv_path: str | Path,
    size: int | Sequence[int] = 224,
    *,
    file_column: str = "file",
    labels_column: str | None = None,
    separator: str = "|",
    split_column: str | None = None,
    labels: Sequence[str] | None = None,
    channels: int = 3,
    max_value: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    crop_padding: int = 0,
    metric: str = "mean_average_precision",
    thresholds: float | Sequence[float] = (),
    workers: int = 4,
    memory_mb: int = 512,
) -> MultiLabel:
    """A folder of images and a CSV file: a column for each label with 0 and 1, or one column that names the labels.

    Images are read as `image_folder` reads them, when they are needed.

    Args:
        path: the folder that the names in `file_column` start from.
        csv_path: the CSV file, UTF-8, with a header.
        size: side of the input in pixels, or (height, width).
        file_column: of the image's path below the folder.
        labels_column: names of the labels of a row, apart by `separator`; None: every other column is a label.
        separator: of `labels_column`.
        split_column: says the split of a row (train, calibration, validation, test); None: dealt out by content.
        labels: in the order of the logits; default the columns in their order, or the names that occur, sorted.
        channels: 3 for RGB, 1 for grey; files are converted.
        max_value: as of `image_folder`.
        mean: per channel, of pixels in 0 ... 1; default ImageNet's.
        std: likewise.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        flip: mirror half of the training images.
        crop_padding: move training images by up to so many pixels.
        metric: ``mean_average_precision`` or ``f1``.
        thresholds: probability from which a class counts, one number or one for each; none: 0.5.
        workers: threads that read files.
        memory_mb: keep the inputs of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder or file, or a row that cannot be right; names its line.
    """
    folder, table = Path(path), Path(csv_path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give the folder that the image files lie in")
    check_image_arguments(size, channels, max_value)
    rows, names = _read(table, folder, file_column, labels_column, separator, split_column, labels)
    if max_value is None:
        max_value = common_white([row.file for row in rows], workers)
    preprocessing = image_preprocessing(size, channels, mean, std, max_value)
    reader = ImageReader(preprocessing, workers, memory_mb)
    if split_column is None:
        digests = reader.digests([row.file for row in rows])
        together = torch.zeros(len(rows), dtype=torch.int64)
        dealt = stratified_split(digests, together, ("all",), fractions, seed)
        parts = {name: [rows[index] for index in chosen] for name, chosen in dealt.items()}
    else:
        parts = {name: [row for row in rows if row.split == name] for name in SPLITS}
    return MultiLabel(
        {name: _files(part, names, reader) for name, part in parts.items() if part},
        names,
        metric=metric,
        thresholds=thresholds,
        preprocessing=preprocessing,
        augment=_varied(flip, crop_padding) if flip or crop_padding else None,
        name=folder.name or "multilabel",
    )


def _varied(flip: bool, crop_padding: int) -> Augmentation:
    """`flip_and_crop` of the images; what they show stays."""
    change = flip_and_crop(flip, crop_padding)
    return lambda batch, generator: Batch((change(batch.inputs[0], generator),), batch.targets)


@dataclass(frozen=True)
class _Row:
    file: Path
    shown: frozenset[str]
    split: str | None


def _files(rows: Sequence[_Row], names: Sequence[str], reader: ImageReader) -> FileSplit:
    targets = torch.tensor([[float(name in row.shown) for name in names] for row in rows], dtype=torch.float32)
    return FileSplit([row.file for row in rows], targets, reader)


def _read(
    table: Path,
    folder: Path,
    file_column: str,
    labels_column: str | None,
    separator: str,
    split_column: str | None,
    labels: Sequence[str] | None,
) -> tuple[list[_Row], tuple[str, ...]]:
    """The rows of the file, each held against the folder, and the names of the labels."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read ({error}): give a CSV file in UTF-8") from error
    lines = csv.DictReader(text.splitlines())
    columns = list(lines.fieldnames or ())
    for what, column in (
        ("file_column", file_column),
        ("labels_column", labels_column),
        ("split_column", split_column),
    ):
        if column is not None and column not in columns:
            there = ", ".join(columns) or "none"
            raise DataError(
                f"{table} has no column {column!r}{did_you_mean(column, columns)}; it has {there}: set {what}"
            )
    own = [column for column in columns if column not in (file_column, split_column)]
    known = tuple(map(str, labels)) if labels is not None else tuple(own) if labels_column is None else None
    found: dict[Path, int] = {}
    rows: list[_Row] = []
    for values in lines:
        place = f"{table}, line {lines.line_num}"
        if None in values or any(value is None for value in values.values()):
            raise DataError(f"{place}: the row has another number of cells than the header: repair it")
        file = _image(values[file_column], folder, place)
        if file in found:
            raise DataError(
                f"{place}: {values[file_column]!r} was in line {found[file]} already: leave one of them out"
            )
        found[file] = lines.line_num
        shown = (
            _named(values[labels_column], separator, known, place)
            if labels_column is not None
            else _marked(values, known or (), place)
        )
        rows.append(_Row(file, shown, None if split_column is None else _split(values[split_column], place)))
    if not rows:
        raise DataError(f"{table} has no row: add one for each image")
    return rows, known if known is not None else tuple(sorted({name for row in rows for name in row.shown}))


def _image(name: str, folder: Path, place: str) -> Path:
    file = folder / name
    if not name.strip() or not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{place}: {name!r} is no path below {folder}: give the image's path there")
    if not file.is_file():
        raise DataError(f"{place}: there is no image {file}: add it, or leave the row out")
    return file


def _named(text: str, separator: str, known: Sequence[str] | None, place: str) -> frozenset[str]:
    names = [part.strip() for part in text.split(separator) if part.strip()]
    for name in names:
        if known is not None and name not in known:
            raise DataError(
                f"{place}: unknown label {name!r}{did_you_mean(name, list(known))}; labels has {', '.join(known)}"
            )
    return frozenset(names)


def _marked(values: Mapping[str, str], known: Sequence[str], place: str) -> frozenset[str]:
    shown = []
    for name in known:
        if name not in values:
            raise DataError(f"{place}: there is no column for the label {name!r}{did_you_mean(name, list(values))}")
        said = values[name].strip().lower()
        if said not in _YES | _NO:
            raise DataError(f"{place}: {name!r} is {values[name]!r}: a label is 1 or 0")
        if said in _YES:
            shown.append(name)
    return frozenset(shown)


def _split(said: str, place: str) -> str:
    if said not in SPLITS:
        raise DataError(
            f"{place}: unknown split {said!r}{did_you_mean(said, list(SPLITS))}; there are {', '.join(SPLITS)}"
        )
    return said
