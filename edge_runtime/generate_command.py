"""The command ``generate``: text or token ids in, text or token ids out as they come, then how fast it was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .manifest import MODEL_FILE, TOKENIZER_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="an ONNX file with its cache, or its folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="needs the package tokenizers (extra [text])")
    prompt.add_argument("--ids", metavar="ID,ID,...", type=_ids, help="token ids in place of a text")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=f"default {TOKENIZER_FILE} beside the model")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most so many, default 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    parser.add_argument("--stop", type=int, metavar="ID", help="the token that ends the answer")


def run(options: argparse.Namespace, session: Mapping[str, Any]) -> dict[str, Any]:
    """Generates, prints, and returns the figures.

    Args:
        options: of the parser.
        session: what `Generator` takes.

    Raises:
        InputError: no model, no tokenizer, or options that make no sense.
    """
    from .generation import Generator, generate

    model: Path = options.model / MODEL_FILE if options.model.is_dir() else options.model
    ids, decode = options.ids, None
    if ids is None:
        ids, decode = _encoded(options.prompt, options.tokenizer or model.parent / TOKENIZER_FILE)
    generator = Generator(model, **session)
    printed = _Printer(decode)
    found = generate(
        generator,
        [ids],
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        stop=options.stop,
        on_token=lambda _row, token: printed.take(token),
    )
    printed.end()
    decoded, peak = found.decode_tokens_per_second, _peak_memory()
    first_ms = 1e3 * found.prefill_seconds
    print(
        f"prefill {found.prefill_tokens_per_second:.1f} tokens/s, first token after {first_ms:.1f} ms, "
        + (f"decode {decoded:.1f} tokens/s" if decoded is not None else "no decode step")
        + ("" if peak is None else f", peak memory {peak / 2**20:.0f} MiB"),
        file=sys.stderr,
    )
    return {
        "tokens": list(found.tokens[0]),
        "prompt_tokens": found.prompt_tokens,
        "first_token_ms": first_ms,
        "prefill_tokens_per_second": found.prefill_tokens_per_second,
        "decode_tokens_per_second": decoded,
        "peak_memory_bytes": peak,
    }


class _Printer:
    """Shows tokens as they come: ids, or the text that they have become so far."""

    def __init__(self, decode: Callable[[list[int]], str] | None) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = 0

    def take(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        if self._decode is None:
            print(token, end=" ", flush=True)
            return
        text = self._decode(self._tokens)
        # half a character decodes to a replacement mark: wait for its other bytes
        if not text.endswith("\ufffd"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    def end(self) -> None:
        """Nothing more comes."""
        if self._decode is not None:
            print(self._decode(self._tokens)[self._shown :], end="")
        print(flush=True)


def _encoded(prompt: str, place: Path) -> tuple[list[int], Callable[[list[int]], str]]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "--prompt needs the package tokenizers (pip install 'edgewright[text]'); --ids takes token ids without it"
        ) from None
    if not place.is_file():
        raise InputError(f"there is no tokenizer {place}: name a tokenizer.json with --tokenizer, or give --ids")
    try:
        tokenizer: Any = Tokenizer.from_file(str(place))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{place} is no tokenizer: {error}") from error
    return list(tokenizer.encode(prompt).ids), lambda ids: str(tokenizer.decode(ids))


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _peak_memory() -> int | None:
    """Of this process, None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
