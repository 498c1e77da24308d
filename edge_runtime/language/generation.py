"""Generating tokens with an exported language model: numpy and ONNX Runtime, the cache never copied to numpy."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import END_TOKENS, LOGITS, LOGITS_FROM, PAST, POSITIONS, POSITIONS_REASON, PRESENT
from ..errors import EdgewrightError, InputError
from ..inference.options import SessionKeywords, SessionOptions
from ..inference.session import session_on
from .sampling import Sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Generation:
    """What came out, and how long it took.

    Attributes:
        tokens: new tokens of every row, without what follows its stop token.
        prompt_tokens: of all rows together.
        prefill_seconds: until the first token of every row was known.
        decode_seconds: for all further steps.
        steps: further steps.
        context_full: it ended because the model has no further positions.
    """

    tokens: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    steps: int
    context_full: bool = False

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens of all rows per second after the first; None if there was one step only."""
        return len(self.tokens) * self.steps / self.decode_seconds if self.steps else None


class Generator:
    """A session on a file that `export_generator` wrote, and its cache.

    Args:
        model: the ONNX file.
        options: as in `load`.
        given: as in `load`: providers, threads, allow_fallback, optimization_level.

    Attributes:
        positions: the longest sequence that the file answers as the model does, prompt and answer together; None: any.
        positions_reason: why it ends there, where the model itself goes on; else empty.
        end_tokens: what the model says when it has finished.

    Raises:
        InputError: no such file, or one without a cache among its inputs and outputs.
        ProviderError: as in `load`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        options: SessionOptions | None = None,
        **given: Unpack[SessionKeywords],
    ) -> None:
        self._session: Any = session_on(model, options, **given).session
        self._past = [i for i in self._session.get_inputs() if i.name.startswith(PAST)]
        outputs = {o.name: o for o in self._session.get_outputs()}
        wanted = {LOGITS, *(i.name.replace(PAST, PRESENT, 1) for i in self._past)}
        if not self._past or wanted - outputs.keys():
            raise InputError(
                f"{model} has no cache (inputs {PAST}*, outputs {LOGITS}, {PRESENT}*): write it with export_generator"
            )
        written = self._session.get_modelmeta().custom_metadata_map
        self.positions: int | None = json.loads(written.get(POSITIONS, "null"))
        self.positions_reason: str = written.get(POSITIONS_REASON, "")
        self.end_tokens: tuple[int, ...] = tuple(json.loads(written.get(END_TOKENS, "[]")))
        vocabulary = outputs[LOGITS].shape[-1]
        self._vocabulary = vocabulary if isinstance(vocabulary, int) else sys.maxsize
        self._chooses = any(i.name == LOGITS_FROM for i in self._session.get_overridable_initializers())
        self._cache: dict[str, Any] = {}
        self._mask = np.zeros((0, 0), np.int64)

    @property
    def positions_left(self) -> int:
        """How many more tokens the longest row may have."""
        return sys.maxsize if self.positions is None else self.positions - self._mask.shape[1]

    def prefill(self, prompts: Sequence[Sequence[int]], *, last_only: bool = False) -> NDArray[np.float32]:
        """Forgets what was before and reads `prompts`, shorter ones padded on the left.

        Args:
            prompts: token ids per row.
            last_only: the head is computed at the last token only, which is all that generating needs.

        Returns:
            Logits [N, longest, V], those of the padding mean nothing; [N, 1, V] with `last_only`.

        Raises:
            InputError: no prompt, an empty one, one that is longer than the model's context, or a token that the model
                does not know.
        """
        import onnxruntime

        if not prompts or not all(prompts):
            raise InputError("every prompt needs at least one token")
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        self._mask = mask[:, :0]
        self._cache = {}
        for spec in self._past:
            heads, width = spec.shape[1], spec.shape[3]
            empty = np.zeros((len(prompts), heads, 0, width), np.float32)
            self._cache[spec.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return self._run(ids, mask, last_only)

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Goes on with the tokens `ids` [N, S].

        Returns:
            Logits [N, S, V].

        Raises:
            InputError: before any prefill, with another number of rows, a token that the model does not know, or more
                tokens than it has positions for.
        """
        if len(ids) != len(self._mask) or not self._cache:
            raise InputError(f"{len(ids)} rows cannot go on from {len(self._mask)}: prefill first")
        return self._run(np.ascontiguousarray(ids, np.int64), np.ones(ids.shape, np.int64))

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], last_only: bool = False) -> NDArray[np.float32]:
        import onnxruntime

        unknown = (ids < 0) | (ids >= self._vocabulary)
        if unknown.any():
            raise InputError(
                f"the token {ids[unknown][0]} is none of the {self._vocabulary} that the model knows: "
                "use the tokenizer that belongs to it"
            )
        if ids.shape[1] > self.positions_left:
            why = f" ({self.positions_reason})" if self.positions_reason else ""
            raise InputError(
                f"{self._mask.shape[1] + ids.shape[1]} tokens are more than the model's context of {self.positions}"
                f"{why}: shorten the prompt"
            )
        self._mask = np.concatenate([self._mask, mask], axis=1)
        names = [LOGITS, *(name.replace(PAST, PRESENT, 1) for name in self._cache)]
        try:
            if last_only and self._chooses:
                given = {"input_ids": ids, "attention_mask": self._mask, LOGITS_FROM: np.array([-1], np.int64)}
                values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in given.items()}
                # a binding takes no input that has a default
                found = self._session.run_with_ort_values(names, values | self._cache)
            else:
                binding = self._session.io_binding()
                binding.bind_cpu_input("input_ids", ids)
                binding.bind_cpu_input("attention_mask", self._mask)
                for name, value in self._cache.items():
                    binding.bind_ortvalue_input(name, value)
                for name in names:
                    binding.bind_output(name)
                self._session.run_with_iobinding(binding)
                found = binding.get_outputs()
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EdgewrightError(f"ONNX Runtime failed on {ids.shape[1]} new tokens: {error}") from error
        # the new cache becomes the next past as it is, where it is
        self._cache = dict(zip(self._cache, found[1:], strict=True))
        logits: NDArray[np.float32] = found[0].numpy()
        # a file of another exporter has no such input
        return logits[:, -1:] if last_only else logits


def generate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008
    stop: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continues every prompt by at most `tokens` tokens, fewer where the model has no positions for them.

    Args:
        generator: a loaded model.
        prompts: token ids per row.
        tokens: at least 1.
        sampling: how tokens are chosen.
        stop: the tokens that end a row; `Generator.end_tokens` are the model's own.
        on_token: called with row and token as soon as a token is known.

    Raises:
        InputError: options that make no sense; see `Generator.prefill`.
    """
    if tokens < 1:
        raise InputError(f"at least one token can be generated, not {tokens}")
    random = sampling.generator()
    found: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)

    def take(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        chosen = np.asarray([sampling.choose(row, random) for row in logits[:, -1]], np.int64)
        for row, token in enumerate(chosen.tolist()):
            if not ended[row]:
                found[row].append(token)
                ended[row] = token in stop
                if on_token is not None:
                    on_token(row, token)
        return chosen[:, None]

    start = time.perf_counter()
    following = take(generator.prefill(prompts, last_only=True))
    first = time.perf_counter()
    steps = 0
    while steps < tokens - 1 and not all(ended) and generator.positions_left > 0:
        following = take(generator.step(following))
        steps += 1
    end = time.perf_counter()
    full = steps < tokens - 1 and not all(ended)
    return Generation(tuple(map(tuple, found)), sum(map(len, prompts)), first - start, end - first, steps, full)
