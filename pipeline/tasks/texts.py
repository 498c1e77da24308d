"""Texts as inputs of a task: read, encoded by the code that encodes them on the device, and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import TOKENIZER_FILE, Preprocessing
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.inference.text_file import encoded, padding_of

from ..errors import DataError

_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TextReader:
    """Encodes texts.

    Attributes:
        file: the tokenizer.json.
        content: of it.
        preprocessing: for the manifest.
        names: of the model's inputs.
    """

    file: Path
    content: str
    preprocessing: Preprocessing
    names: tuple[str, ...]

    def inputs(self, texts: Sequence[str | tuple[str, ...]]) -> list[Tensor]:
        """Int64 [len, window] for each of `names`.

        Raises:
            DataError: a text has no token.
        """
        try:
            return [torch.from_numpy(x) for x in encoded(texts, self.content, self.preprocessing, self.names).values()]
        except InputError as error:
            raise DataError(str(error)) from None


def text_reader(path: str | Path, window: int, mask: bool, types: bool = False) -> TextReader:
    """A reader that uses a tokenizer.

    Args:
        path: a ``tokenizer.json``, or the folder that it lies in.
        window: tokens of a text; longer ones are cut, shorter ones filled with the tokenizer's padding or 0.
        mask: whether the model takes, as its second input, which tokens are none of padding.
        types: whether it takes, as its third, which text of a pair a token is of.

    Raises:
        DataError: no such file, no tokenizer, or a window that is none.
    """
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise DataError(f"window is {window!r}: give the number of tokens that the model reads")
    if types and not mask:
        raise DataError("types are the third input, behind the mask: set mask too")
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no tokenizer from {file}: {error}; give a tokenizer.json or its folder") from None
    try:
        padding = padding_of(content)
    except InputError as error:
        raise DataError(f"{file}: {error}") from None
    names = _NAMES[: 1 + mask + types]
    return TextReader(file, content, Preprocessing(kind="text", window=window, padding=padding), names)
