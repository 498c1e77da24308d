"""Texts in classes: a CSV file, or one with a JSON object in each line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError
from ...sources import content_digest
from ...task import SPLITS, Split, SplitName
from ..image_classification import ImageClassification
from ..splits import TensorSplit
from ..splitting import stratified_split
from ..texts import text_reader


class TextClassification(ImageClassification):
    """A class for each text, of which the model is given the tokens.

    Args:
        splits: as of `ImageClassification`.
        labels: class names.
        tokenizer: content of the tokenizer.json, which goes into the bundle.
        options: as of `ImageClassification`.
    """

    def __init__(
        self, splits: Mapping[SplitName, Split], labels: Sequence[str], *, tokenizer: str, **options: Any
    ) -> None:
        super().__init__(splits, labels, **options)
        self.tokenizer = tokenizer


def text_classification(
    path: str | Path,
    tokenizer_path: str | Path,
    *,
    text_column: str = "text",
    second_column: str | None = None,
    label_column: str = "label",
    split_column: str | None = None,
    labels: Sequence[str] | None = None,
    window: int = 64,
    mask: bool = True,
    types: bool = False,
    metric: str = "accuracy",
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
) -> TextClassification:
    """``text,label`` lines of a CSV file with a header, or of a .jsonl; the bundle's `predict` takes a .txt.

    Args:
        path: the table, UTF-8; a name that ends with .jsonl or .ndjson has a JSON object in each line.
        tokenizer_path: a ``tokenizer.json``, or the folder that it lies in.
        text_column: column, or key, of the text.
        second_column: of the second text, for pairs.
        label_column: of the name of the class.
        split_column: says the split of a line (train, calibration, validation, test); None: dealt out by content.
        labels: in the order of the logits; default those that occur, sorted.
        window: tokens of a text; longer ones are cut, shorter ones filled with the tokenizer's padding or 0.
        mask: whether the model takes, as its second input, 1 for each token that is none of padding.
        types: whether it takes, as its third, which text of a pair a token is of.
        metric: as of `ImageClassification`.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split; equal texts stay together.

    Raises:
        DataError: a line that cannot be right; names it.
    """
    table = Path(path)
    wanted = [text_column, *([second_column] if second_column else []), label_column]
    rows = list(_rows(table, [*wanted, *([split_column] if split_column else [])]))
    if not rows:
        raise DataError(f"{table} has no lines with texts")
    names = tuple(map(str, labels)) if labels is not None else tuple(sorted({row[label_column] for _, row in rows}))
    classes = []
    for line, row in rows:
        label = row[label_column]
        if label not in names:
            raise DataError(f"{table}, line {line}: unknown label {label!r}{did_you_mean(label, list(names))}")
        classes.append(names.index(label))
        if split_column and row[split_column] not in SPLITS:
            raise DataError(f"{table}, line {line}: unknown split {row[split_column]!r}; there are {', '.join(SPLITS)}")
    reader = text_reader(tokenizer_path, window, mask, types)
    texts = [(row[text_column], row[second_column]) if second_column else row[text_column] for _, row in rows]
    whole = TensorSplit(reader.inputs(texts), torch.tensor(classes))
    dealt: Mapping[SplitName, Sequence[int]]
    if split_column:
        dealt = {name: [i for i, (_, row) in enumerate(rows) if row[split_column] == name] for name in SPLITS}
    else:
        dealt = stratified_split(whole.sample_digests, whole.targets, names, fractions, seed)
    splits = {}
    for name, chosen in dealt.items():
        if chosen:
            batch = whole.batch(list(chosen))
            splits[name] = TensorSplit(batch.inputs, batch.targets)
    return TextClassification(
        splits,
        names,
        tokenizer=reader.content,
        preprocessing=reader.preprocessing,
        metric=metric,
        name=table.stem,
        input_name=reader.names,
        file_digests={file: content_digest(file) for file in (table, reader.file)},
    )


def _rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of each line and its texts by column; every one is there and has a character."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            read = _json_lines if table.suffix.lower() in (".jsonl", ".ndjson") else _csv_lines
            for line, row in read(table, stream, columns):
                for column in columns:
                    if not row[column].strip():
                        raise DataError(f"{table}, line {line}: {column!r} is empty: fill it or remove the line")
                yield line, {column: row[column].strip() for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read in UTF-8 ({error})") from error


def _csv_lines(table: Path, stream: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    lines = csv.reader(stream, strict=True)
    header = [name.strip() for name in next(lines, [])]
    for column in columns:
        if header.count(column) != 1:
            how = "no column" if column not in header else "more than one column"
            raise DataError(f"{table}, line 1: {how} {column!r}; there are {', '.join(map(repr, header)) or 'none'}")
    for row in lines:
        if row:
            if len(row) != len(header):
                raise DataError(f"{table}, line {lines.line_num}: {len(row)} cells where the header has {len(header)}")
            yield lines.line_num, dict(zip(header, row, strict=True))


def _json_lines(table: Path, stream: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{table}, line {line} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{table}, line {line} is no JSON object: each line is one, with {', '.join(columns)}")
        found = {}
        for column in columns:
            value = row.get(column)
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise DataError(f"{table}, line {line}: {column!r} is {value!r}: a text is needed")
            found[column] = str(value)
        yield line, found
