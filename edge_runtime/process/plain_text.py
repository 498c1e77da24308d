"""Text from anywhere, made fit to print: it must neither steer a terminal nor end the program."""

from __future__ import annotations


def printable(text: object) -> str:
    """On one line: whatever is not printable, line breaks included, in Python's notation."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def printable_lines(text: object) -> str:
    r"""As `printable`, but line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return repr(character)[1:-1]
