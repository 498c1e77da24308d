"""Up to which length a generator's file answers as its model does.

A short proof says nothing about long texts: windows and chunks of attention begin to forget, rotary factors change. So
the file reads one long text, past every length at which the configuration says that something changes, and is claimed
as far as its logits are those of the model that reads the text whole and without a cache.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.language.generation import Generator
from edgewright.models.sources.capturable import rotary_limit
from edgewright.models.sources.pretrained import LogitsOnly

_LENGTH = re.compile(
    r"^(?!num_|.*layer).*(window|chunk|position|context|seq|length|local|block|span|scale$|topk|compress|stride)"
)
"""What the configuration calls numbers of tokens; one that is none costs a few steps of the proof."""

_ALWAYS = 512
"""Tokens that the long text has where nothing changes earlier or later."""

_CHUNK = 512
"""Most new tokens of a run: attention takes memory for each of them times all tokens before."""

_AROUND = 4
"""Tokens that are read one by one before and behind a length, in the rows' different counts."""

_SHORTER = 3
"""Tokens that the second row lacks, so that it is padded."""


@dataclass(frozen=True)
class Reach:
    """How far a file is claimed.

    Attributes:
        positions: the longest sequence; None: any.
        reason: why it ends before the model itself does; empty where it does not.
        tokens: length of the text that the proof read.
        crossed: lengths at which the configuration says that something changes and that the proof got past.
        max_abs_diff: largest difference of a logit within `positions`.
    """

    positions: int | None
    reason: str
    tokens: int
    crossed: tuple[int, ...]
    max_abs_diff: float

    def text(self) -> str:
        """One sentence for the manifest; how far, and why not further."""
        said = f"the cache was held to the whole text over {self.tokens} tokens"
        if self.crossed:
            said += f", past the lengths at which the configuration changes something ({_listed(self.crossed)})"
        return said + (f"; positions end at {self.positions}: {self.reason}" if self.reason else "")


def claimed_positions(model: LogitsOnly, farthest: int) -> tuple[int | None, str]:
    """The longest sequence that a proof over `farthest` tokens may claim, and why not the model's own end.

    Args:
        model: a causal language model.
        farthest: the longest text that the proof may read.
    """
    positions, reason = model.positions, ""
    limit = rotary_limit(model)
    if limit is not None and limit[0] <= (positions or sys.maxsize):
        positions, reason = limit
    beyond = {length: name for length, name in announced_lengths(model).items() if length + _AROUND > farthest}
    first = min(beyond, default=sys.maxsize)
    if first <= (positions or sys.maxsize):
        reason = f"its configuration changes something there ({beyond[first]}), and the proof reads {farthest} tokens"
        positions = first - 1
    return positions, reason


def announced_lengths(model: LogitsOnly) -> dict[int, str]:
    """Numbers of tokens in the model's configuration, within its positions, and what they are called there."""
    config = getattr(model.model, "config", None)
    last = model.positions or sys.maxsize
    found: dict[int, str] = {}
    for name, value in _numbers(config.to_dict() if config is not None else {}):
        if _LENGTH.match(name) and 1 < value < last and float(value).is_integer():
            found.setdefault(int(value), f"{name} {int(value)}")
    return dict(sorted(found.items()))


@torch.no_grad()
def proven_reach(model: LogitsOnly, path: Path, tokens: Tensor, farthest: int, tolerance: float) -> Reach:
    """Lets the file `path` read a long text, and says how far it answers as `model` does.

    Two rows, one of them padded, go through the file twice: in large chunks, and token by token around every length.

    Args:
        model: a causal language model.
        path: the exported file, which claims `claimed_positions`.
        tokens: int64 [N, T], texts whose tokens the long one is drawn from.
        farthest: the longest text that may be read.
        tolerance: largest allowed difference of a logit.
    """
    positions, reason = claimed_positions(model, farthest)
    end = positions or sys.maxsize
    crossed = tuple(length for length in announced_lengths(model) if length + _AROUND <= min(end, farthest))
    length = min(end, farthest, max(_ALWAYS, *(place + _AROUND for place in crossed), 0))
    if length <= _SHORTER + 1:
        return Reach(positions, reason, 0, (), 0.0)
    drawn = torch.randint(tokens.numel(), (2, length), generator=torch.Generator().manual_seed(0))
    text = tokens.flatten()[drawn]
    rows = [text[0], text[1, _SHORTER:]]
    expected = [model(row[None])[0].numpy() for row in rows]
    generator = Generator(path, threads=1)
    worst = np.zeros(length)
    for sizes in (_chunks(length, ()), _chunks(length, (*crossed, length))):
        worst = np.maximum(worst, _differences(generator, rows, expected, sizes))
    wrong = np.flatnonzero(~(worst <= tolerance))
    if not len(wrong):
        return Reach(positions, reason, length, crossed, float(worst.max()))
    known = _last_right(model, generator, rows, expected, int(wrong[0]), tolerance)
    names = [name for place, name in announced_lengths(model).items() if abs(place - known) <= _AROUND]
    said = f" ({', '.join(names)} in its configuration)" if names else ""
    off = float(np.nanmax(worst[known:])) if known < length else float("nan")
    reason = f"behind them cached keys give other logits than the whole text, off by up to {off:.2g}{said}"
    within = float(worst[:known].max(initial=0.0))
    return Reach(known, reason, length, tuple(place for place in crossed if place < known), min(within, tolerance))


def _last_right(
    model: LogitsOnly,
    generator: Generator,
    rows: Sequence[Tensor],
    expected: Sequence[NDArray[np.float32]],
    first_wrong: int,
    tolerance: float,
) -> int:
    """The longest sequence up to which the file is right.

    Where what the model says of a beginning does not depend on what follows, that is what comes before the first wrong
    token. Otherwise the whole text says nothing about its beginnings, and lengths are tried one after another.
    """

    def alone(row: int, length: int) -> NDArray[np.float32]:
        return model(rows[row][None, : length - row * _SHORTER])[0, -1].numpy()  # type: ignore[no-any-return]

    def right(length: int) -> bool:
        seen = _last_logits(generator, rows, length)
        return all(float(np.abs(logits - alone(row, length)).max()) <= tolerance for row, logits in enumerate(seen))

    least = _SHORTER + 2
    if first_wrong > least and all(
        float(np.abs(alone(row, first_wrong) - of[first_wrong - 1 - row * _SHORTER]).max()) <= tolerance
        for row, of in enumerate(expected)
    ):
        return first_wrong
    low, high = least, len(rows[0])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if right(middle) else (low, middle)
    return low


def _differences(
    generator: Generator, rows: Sequence[Tensor], expected: Sequence[NDArray[np.float32]], sizes: Sequence[int]
) -> NDArray[np.float64]:
    """The largest difference of a logit at every token of the longest row, float64 [T]; NaN where one is none."""
    worst = np.zeros(len(rows[0]))
    at = 0
    for logits in _run(generator, rows, sizes):
        for row, of in enumerate(expected):
            missing = len(rows[0]) - len(of)
            skipped = max(0, missing - at)  # padding
            part = of[at + skipped - missing : at + logits.shape[1] - missing]
            off = np.abs(logits[row, skipped:] - part).max(axis=-1)
            place = slice(at + skipped, at + logits.shape[1])
            worst[place] = np.maximum(worst[place], off)
        at += logits.shape[1]
    return worst


def _last_logits(generator: Generator, rows: Sequence[Tensor], length: int) -> list[NDArray[np.float32]]:
    """Of every row cut to the longest's `length`, read in chunks and its last token alone."""
    cut = [row[: length - (len(rows[0]) - len(row))] for row in rows]
    logits = np.zeros((len(rows), 1, 1), np.float32)
    for found in _run(generator, cut, [*_chunks(length - 1, ()), 1]):
        logits = found[:, -1:].copy()
    return list(logits[:, 0])


def _run(generator: Generator, rows: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """The logits [N, size, V] of every run; rows are padded on the left."""
    longest = len(rows[0])
    padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]).numpy()
    first = sizes[0]
    yield generator.prefill([row[: first - (longest - len(row))].tolist() for row in rows])
    at = first
    for size in sizes[1:]:
        yield generator.step(padded[:, at : at + size])
        at += size


def _chunks(length: int, alone: Sequence[int]) -> list[int]:
    """How many tokens each run reads: `_CHUNK` at most, one around the lengths `alone`."""
    single = {place + off for place in alone for off in range(-_AROUND, _AROUND)}
    sizes, at = [], min(length, _SHORTER + 1)
    sizes.append(at)
    while at < length:
        size = 1
        while at not in single and size < _CHUNK and at + size < length and at + size not in single:
            size += 1
        sizes.append(size)
        at += size
    return sizes


def _numbers(settings: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of nested settings, by the last name above them."""
    if isinstance(settings, bool):
        return
    if isinstance(settings, int | float):
        yield name, settings
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _numbers(value, name)


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
