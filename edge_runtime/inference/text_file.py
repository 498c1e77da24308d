"""Texts as a network's inputs: one encoder, for tasks and `predict` alike. Needs the package tokenizers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle
from ..bundle.manifest import TOKENIZER_FILE, Preprocessing
from ..errors import InputError

SUFFIXES = frozenset((".txt",))
"""Endings of files that `read_texts` reads."""


def encode_texts(texts: Sequence[str], bundle: Bundle) -> dict[str, NDArray[np.int64]]:
    """What `Runner.predict` takes of texts.

    Args:
        texts: one for each row; where the model reads pairs, the two are apart by a tab.
        bundle: of a model that reads texts; its tokenizer lies in it.

    Returns:
        Input name -> int64 [N, window].

    Raises:
        InputError: the bundle does not say how texts become its input, the package tokenizers is not installed, or a
            text is empty.
    """
    manifest = bundle.manifest
    if manifest.preprocessing.kind != "text" or TOKENIZER_FILE not in manifest.files:
        raise InputError(f"the bundle {manifest.name} does not say how texts become its input: give a .npy or .npz")
    pairs = [tuple(text.split("\t", 1)) if "\t" in text else text for text in texts]
    with bundle.unchanged([TOKENIZER_FILE]):
        content = bundle.path(TOKENIZER_FILE).read_text(encoding="utf-8")
    return encoded(pairs, content, manifest.preprocessing, [spec.name for spec in manifest.inputs])


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file in UTF-8, those without a character left out.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text in UTF-8 ({error})") from None
    if not lines:
        raise InputError(f"{path} has no line with a text")
    return lines


def encoded(
    texts: Sequence[str | tuple[str, ...]], tokenizer: str, preprocessing: Preprocessing, names: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """The tokens of texts, cut or filled up to the window.

    Args:
        texts: one for each row, or pairs.
        tokenizer: content of a tokenizer.json; its own settings of padding and truncation are not used.
        preprocessing: of kind ``"text"``.
        names: of the inputs: tokens; then, if there are as many, 1 for each token that is none of padding; then 0 or 1
            for the first or second text of a pair.

    Returns:
        Name -> int64 [N, window].

    Raises:
        InputError: tokenizers is not installed or cannot read the content, or a text has no token.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "texts need the package tokenizers (pip install 'edgewright[text]'); token ids as a .npz do without"
        ) from None
    try:
        made: Any = Tokenizer.from_str(tokenizer)
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"no tokenizer can be made of the tokenizer.json: {error}") from error
    window = preprocessing.window
    assert window is not None, "as the manifest was checked"
    made.no_padding()
    made.enable_truncation(window)
    found = made.encode_batch([text if isinstance(text, str) else tuple(text) for text in texts])
    for text, one in zip(texts, found, strict=True):
        if not one.ids:
            raise InputError(f"the text {text!r} has no token: give one that is not empty")

    def filled(rows: Sequence[Sequence[int]], with_: int) -> NDArray[np.int64]:
        return np.array([[*row, *(with_ for _ in range(window - len(row)))] for row in rows], np.int64)

    columns = (
        filled([one.ids for one in found], preprocessing.padding),
        filled([[1] * len(one.ids) for one in found], 0),
        filled([one.type_ids for one in found], 0),
    )
    return dict(zip(names, columns, strict=False))


def padding_of(tokenizer: str) -> int:
    """The id that a tokenizer.json fills up with; 0 where it names none.

    Raises:
        InputError: it is no tokenizer, or tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer

        made: Any = Tokenizer.from_str(tokenizer)
    except ImportError:
        raise InputError("texts need the package tokenizers: pip install 'edgewright[text]'") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"no tokenizer can be made of the tokenizer.json: {error}") from error
    return int((made.padding or {}).get("pad_id", 0))
