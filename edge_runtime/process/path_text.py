"""Paths that everything which has to name them can name."""

from __future__ import annotations

import os

from ..errors import InputError
from .plain_text import printable


def check_path(path: str | os.PathLike[str], what: str) -> None:
    """Refuses a path that is no UTF-8 text: neither JSON nor ONNX Runtime could name it.

    Args:
        path: with what Python made of undecodable bytes (surrogates).
        what: how the message calls it.

    Raises:
        InputError: shows the path with the bytes escaped.
    """
    text = os.fspath(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{what} has a name that is not UTF-8 text, {printable(text)}: rename it, or work from a folder whose "
            "path is"
        ) from None
