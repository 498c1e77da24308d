"""The command ``generate``: texts or token ids in, texts or token ids out as they come, then how fast it was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import MODEL_FILE, TOKENIZER_FILE
from ..errors import InputError
from ..process.plain_text import printable_lines

if TYPE_CHECKING:
    from ..inference.options import SessionOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("bundle", type=Path, metavar="MODEL", help="the bundle of a generator, or its bare ONNX file")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help="needs the package tokenizers (extra [text]); repeat for more"
    )
    prompt.add_argument(
        "--ids", action="append", metavar="ID,ID,...", type=_ids, help="token ids in place of a text; repeat for more"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=f"default {TOKENIZER_FILE} beside the model")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most so many, default 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest with P of the probability")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    parser.add_argument(
        "--stop", action="append", type=int, metavar="ID", help="a token that ends an answer; default the model's own"
    )
    parser.add_argument("--no-stop", action="store_true", help="always give all --tokens")


def run(options: argparse.Namespace, session: SessionOptions) -> dict[str, Any]:
    """Generates, prints, and returns the figures.

    Args:
        options: of the parser.
        session: of the model.

    Raises:
        BundleError: the bundle is not intact.
        InputError: no model, no tokenizer, or options that make no sense.
    """
    from ..bundle.bundle import open_bundle
    from .generation import Generator, generate
    from .sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    with ExitStack() as opened:
        model: Path = options.bundle
        with ExitStack() as reading:
            if model.is_dir() or model.suffix == ".zip":
                bundle = opened.enter_context(open_bundle(model, options.follow_links))
                reading.enter_context(bundle.unchanged(bundle.manifest.files))
                model = bundle.path(MODEL_FILE)
            prompts, decode = options.ids, None
            if prompts is None:
                prompts, decode = _encoded(options.prompt, options.tokenizer or model.parent / TOKENIZER_FILE)
            generator = Generator(model, session)
        printed = _Printer(decode, len(prompts))
        found = generate(
            generator,
            prompts,
            options.tokens,
            sampling=sampling,
            stop=() if options.no_stop else options.stop or generator.end_tokens,
            on_token=printed.take,
        )
        printed.end()
    decoded, peak = found.decode_tokens_per_second, _peak_memory()
    first_ms = 1e3 * found.prefill_seconds
    if found.context_full:
        why = f" ({generator.positions_reason})" if generator.positions_reason else ""
        print(f"ended at the model's context of {generator.positions} tokens{why}", file=sys.stderr)
    print(
        f"prefill {found.prefill_tokens_per_second:.1f} tokens/s, first token after {first_ms:.1f} ms, "
        + (f"decode {decoded:.1f} tokens/s" if decoded is not None else "no decode step")
        + ("" if peak is None else f", peak memory {peak / 2**20:.0f} MiB"),
        file=sys.stderr,
    )
    return {
        "tokens": [list(row) for row in found.tokens],
        "texts": None if decode is None else [decode(list(row)) for row in found.tokens],
        "prompt_tokens": found.prompt_tokens,
        "context_full": found.context_full,
        "first_token_ms": first_ms,
        "prefill_tokens_per_second": found.prefill_tokens_per_second,
        "decode_tokens_per_second": decoded,
        "peak_memory_bytes": peak,
    }


class _Printer:
    """Shows the tokens of one row as they come, ids or the text that they have become; of several rows at the end."""

    def __init__(self, decode: Callable[[list[int]], str] | None, rows: int) -> None:
        self._decode = decode
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._shown = 0

    def take(self, row: int, token: int) -> None:
        """One more token."""
        self._tokens[row].append(token)
        if len(self._tokens) > 1:
            return
        if self._decode is None:
            print(token, end=" ", flush=True)
            return
        text = self._decode(self._tokens[0])
        # half a character decodes to a replacement mark: wait for its other bytes
        if not text.endswith("\ufffd"):
            print(printable_lines(text[self._shown :]), end="", flush=True)
            self._shown = len(text)

    def end(self) -> None:
        """Nothing more comes."""
        if len(self._tokens) > 1:
            for row, tokens in enumerate(self._tokens):
                text = " ".join(map(str, tokens)) if self._decode is None else printable_lines(self._decode(tokens))
                print(f"[{row}] {text}")
            return
        if self._decode is not None:
            print(printable_lines(self._decode(self._tokens[0])[self._shown :]), end="")
        print(flush=True)


def _encoded(prompts: Sequence[str], place: Path) -> tuple[list[list[int]], Callable[[list[int]], str]]:
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
    # a file may carry the settings of a training run
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [list(tokenizer.encode(prompt).ids) for prompt in prompts]
    if not all(ids):
        raise InputError(f"the prompt {prompts[ids.index([])]!r} has no token: give a text that is not empty")
    return ids, lambda row: str(tokenizer.decode(row))


def _ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a list of token ids like 504,3575") from None
    if max(map(abs, ids)) > sys.maxsize:
        raise argparse.ArgumentTypeError("a token id is larger than any vocabulary")
    return ids


def _peak_memory() -> int | None:
    """Of this process, None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
