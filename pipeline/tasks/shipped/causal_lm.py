"""Next-token prediction on text files, or on the text that comes with Python."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgewright.models.sources.pretrained import packaged_file

from ...errors import DataError
from ...sources import content_digest
from ...task import SplitName
from ..causal_lm import CausalLM, windows_of

_FRACTIONS: Mapping[SplitName, float] = {"train": 0.2, "calibration": 0.25, "validation": 0.05, "test": 0.5}
_SMOLLM2 = "smollm2"
_BYTES = "bytes"
_TOKENIZER_FILE = "tokenizer.json"


def causal_lm(
    path: str | None = None,
    tokenizer: str = _SMOLLM2,
    tokenizer_path: str | None = None,
    window: int = 256,
    fractions: Mapping[SplitName, float] | None = None,
    most: Mapping[SplitName, int] | None = None,
) -> CausalLM:
    """Windows of a text; every split is a stretch of it, in the order train, calibration, validation, test.

    Args:
        path: a UTF-8 text file, or a folder whose ``*.txt`` files are joined in the order of their names, with an
            empty line between; None: the articles of Python's `pydoc_data.topics`, in the order of their keys.
        tokenizer: ``smollm2`` for the packaged one, or ``bytes``: every byte of UTF-8 is a token.
        tokenizer_path: in place of `tokenizer`: a folder with a tokenizer of the transformers library, or a GGUF file.
        window: tokens per window; windows do not overlap.
        fractions: share of the text per split, in the order given; default train 0.2, calibration 0.25, validation
            0.05, test 0.5.
        most: keep at most so many windows of a split, spread evenly.

    Raises:
        DataError: text or tokenizer are not there, cannot be read, or are too short.
    """
    read = _files_of(path, tokenizer_path)
    text, files = _text(path)
    tokens, vocabulary, origin, made = _tokens(text, tokenizer, tokenizer_path)
    splits = windows_of(tokens, window, fractions or _FRACTIONS, most)
    provenance = {"text": files, "tokenizer": origin, "tokens": len(tokens), "window": window}
    return CausalLM(splits, vocabulary, provenance=provenance, tokenizer=made, file_digests=read)


def python_topics() -> str:
    """The English text that comes with Python: 465 kB of language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _files_of(path: str | None, tokenizer_path: str | None) -> dict[Path, str]:
    """The files of the text and of a tokenizer's folder that are there, with their digests."""
    texts = [] if path is None else sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [Path(path)]
    places = [] if tokenizer_path is None else [Path(tokenizer_path)]
    if places and places[0].is_dir():
        # weights of a model may lie beside its tokenizer
        places = [file for kind in ("*.json", "*.txt", "*.model") for file in sorted(places[0].glob(kind))]
    return {file: content_digest(file) for file in (*texts, *places) if os.access(file, os.R_OK) and file.is_file()}


def _text(path: str | None) -> tuple[str, dict[str, str]]:
    """The text, and the sha256 of every file of it."""
    if path is None:
        text = python_topics()
        return text, {"pydoc_data.topics": hashlib.sha256(text.encode()).hexdigest()}
    place = Path(path)
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"the folder {place} has no .txt file: put the text there, or name one file")
    parts, digests = [], {}
    for file in files:
        try:
            data = file.read_bytes()
            parts.append(data.decode("utf-8"))
        except OSError as error:
            raise DataError(f"the text file {file} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the text file {file} is not UTF-8 at byte {error.start}: convert it") from error
        digests[file.name] = hashlib.sha256(data).hexdigest()
    return "\n\n".join(parts), digests


def _tokens(text: str, tokenizer: str, tokenizer_path: str | None) -> tuple[Tensor, int, str, str | None]:
    """Ids int64 [number], the size of the vocabulary, what made them, and that as the text of a tokenizer.json."""
    if tokenizer_path is None and tokenizer == _BYTES:
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64), 256, _BYTES, None
    if tokenizer_path is None and tokenizer != _SMOLLM2:
        raise DataError(f"unknown tokenizer {tokenizer!r}; there are {_SMOLLM2}, {_BYTES}, or give tokenizer_path")
    backend = _backend(tokenizer, tokenizer_path)
    # a file may carry the settings of a training run, and would silently cut the text
    backend.no_truncation()
    backend.no_padding()
    # the whole text at once, without the special tokens that a chat would begin with
    ids = backend.encode(text, add_special_tokens=False).ids
    text_of_it = backend.to_str()
    digest = hashlib.sha256(text_of_it.encode()).hexdigest()
    return torch.tensor(ids, dtype=torch.int64), int(backend.get_vocab_size()), f"sha256 {digest}", text_of_it


def _backend(tokenizer: str, tokenizer_path: str | None) -> Any:
    """The `tokenizers.Tokenizer` of the packaged model, of a folder, or of a GGUF file."""
    try:
        place = packaged_file("smollm2-135m") if tokenizer_path is None else Path(tokenizer_path)
        if (place / _TOKENIZER_FILE).is_file():
            # the file itself, as the device reads it: some classes of transformers make another one of it
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(place / _TOKENIZER_FILE))
        from transformers import AutoTokenizer

        if place.is_file():
            return AutoTokenizer.from_pretrained(
                str(place.parent), gguf_file=place.name, local_files_only=True
            ).backend_tokenizer
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises plain Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"no tokenizer from {tokenizer_path or tokenizer}: {reason}; install 'edgewright[hf]', and give a folder "
            "with tokenizer.json or a GGUF file"
        ) from error
