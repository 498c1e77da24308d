"""Vectors of images or texts: image folders, one for each label, or pairs from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...errors import DataError
from ...sources import content_digest
from ...task import SplitName
from ..embedding import Embedding
from ..image_files import ImageReader, check_image_arguments, common_white, image_preprocessing
from ..texts import text_reader
from .image_folder import image_folder


class TextEmbedding(Embedding):
    """A vector for each text, of which the model is given the tokens.

    Args:
        splits: as of `Embedding`.
        tokenizer: content of the tokenizer.json, which goes into the bundle.
        options: as of `Embedding`.
    """

    def __init__(self, splits: Mapping[SplitName, Any], *, tokenizer: str, **options: Any) -> None:
        super().__init__(splits, **options)
        self.tokenizer = tokenizer


def embedding(
    path: str | Path | None = None,
    csv_path: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    size: int | Sequence[int] = 224,
    *,
    columns: Sequence[str] = ("first", "second"),
    score_column: str | None = None,
    channels: int = 3,
    max_value: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    window: int = 64,
    mask: bool = True,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    crop_padding: int = 0,
    metric: str | None = None,
    temperature: float = 0.1,
) -> Embedding:
    """Rows that belong together get vectors that are near.

    * `path` alone: image folders, one for each label, as of `image_folder`.
    * `path` and `csv_path`: pairs of image files below `path`, a pair in each line. The images are held in memory.
    * `csv_path` and `tokenizer_path`: pairs of texts. The model is given the tokens int64 [N, window], and with `mask`
      1 for each token that is none of padding, int64 [N, window].

    Args:
        path: the folder of the images.
        csv_path: CSV in UTF-8 with a header.
        tokenizer_path: a ``tokenizer.json``, or the folder that it lies in.
        size: side of the images in pixels, or (height, width).
        columns: names of the two columns of a pair.
        score_column: how much the two are alike, -1 to 1; None: they belong together.
        channels: 3 for RGB, 1 for grey.
        max_value: as of `image_folder`.
        mean: likewise.
        std: likewise.
        window: tokens of a text; longer ones are cut, shorter ones filled with the tokenizer's padding or 0.
        mask: whether the model takes the mask as its second input.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        flip: mirror half of the training images of folders.
        crop_padding: move training images of folders by up to so many pixels.
        metric: ``recall@K``, or ``spearman`` for scored pairs.
        temperature: of the softmax over cosines.

    Raises:
        DataError: arguments that do not go together, or a line that cannot be right; names it.
    """
    options: dict[str, Any] = {"metric": metric, "temperature": temperature}
    if csv_path is None:
        if path is None or tokenizer_path is not None:
            raise DataError("an embedding needs a path with image folders, or a csv_path with pairs")
        folders = image_folder(
            path,
            size,
            channels=channels,
            max_value=max_value,
            mean=mean,
            std=std,
            fractions=fractions,
            seed=seed,
            flip=flip,
            crop_padding=crop_padding,
        )
        return Embedding(
            folders.splits,
            augment=folders.augment,
            preprocessing=folders.preprocessing,
            name=folders.name,
            input_name="image",
            **options,
        )
    table = Path(csv_path)
    if (path is None) == (tokenizer_path is None):
        raise DataError(f"the pairs of {table} are images (give path) or texts (give tokenizer_path), one of both")
    if flip or crop_padding:
        raise DataError("flip and crop_padding are for image folders: pairs from a CSV file are taken as they are")
    pairs, scores = _read(table, columns, score_column)
    files = {table: content_digest(table)}
    if tokenizer_path is not None:
        reader = text_reader(tokenizer_path, window, mask)
        sides = [reader.inputs([pair[side] for pair in pairs]) for side in (0, 1)]
        files[reader.file] = content_digest(reader.file)
        options |= {"input_name": reader.names, "preprocessing": reader.preprocessing, "tokenizer": reader.content}
    else:
        assert path is not None
        images, preprocessing = _images(pairs, Path(path), table, size, channels, max_value, mean, std)
        files |= {file: content_digest(file) for file in images}
        sides = [[torch.stack([images[Path(path) / pair[side]] for pair in pairs])] for side in (0, 1)]
        options |= {"input_name": "image", "preprocessing": preprocessing}
    wanted = None if scores is None else torch.tensor(scores, dtype=torch.float32)
    kind = Embedding if tokenizer_path is None else TextEmbedding
    return kind.from_pairs(
        sides[0], sides[1], wanted, fractions=fractions, seed=seed, name=table.stem, file_digests=files, **options
    )


def _read(
    table: Path, columns: Sequence[str], score_column: str | None
) -> tuple[list[tuple[str, str]], list[float] | None]:
    """The pairs, and their scores."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read ({error}): give a CSV file in UTF-8") from error
    lines = csv.DictReader(text.splitlines())
    there = list(lines.fieldnames or ())
    if len(columns) != 2:
        raise DataError(f"columns are {list(columns)}: a pair has two")
    for column in (*columns, *(() if score_column is None else (score_column,))):
        if column not in there:
            raise DataError(f"{table} has no column {column!r}; it has {', '.join(there) or 'none'}")
    pairs, scores = [], []
    for row in lines:
        where = f"{table}, line {lines.line_num}"
        a, b = ((row[column] or "").strip() for column in columns)
        if not a or not b:
            raise DataError(f"{where}: one side of the pair is empty")
        pairs.append((a, b))
        if score_column is not None:
            try:
                scores.append(float(row[score_column] or ""))
            except ValueError:
                raise DataError(f"{where}: the score {row[score_column]!r} is no number") from None
            if not math.isfinite(scores[-1]) or abs(scores[-1]) > 1:
                raise DataError(f"{where}: the score {scores[-1]:g} is not in -1 ... 1, scale the scores")
    if not pairs:
        raise DataError(f"{table} has no pairs")
    return pairs, None if score_column is None else scores


def _images(
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    table: Path,
    size: int | Sequence[int],
    channels: int,
    max_value: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[dict[Path, Tensor], Preprocessing]:
    """Every file once, as an input [C, H, W]."""
    check_image_arguments(size, channels, max_value)
    for number, pair in enumerate(pairs):
        for name in pair:
            file = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DataError(f"{table}, pair {number + 1}: {name!r} leads out of {folder}")
            if not file.is_file():
                raise DataError(f"{table}, pair {number + 1}: there is no file {file}")
    files = sorted({folder / name for pair in pairs for name in pair})
    white = common_white(files, 4) if max_value is None else max_value
    preprocessing = image_preprocessing(size, channels, mean, std, white)
    found = ImageReader(preprocessing).inputs(files)
    return {file: torch.from_numpy(image) for file, image in zip(files, found, strict=True)}, preprocessing
