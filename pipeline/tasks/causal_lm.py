"""The task of language models: predict the next token, in windows of a text that never overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ..errors import DataError
from ..metric import IGNORED, Metric, Perplexity
from ..task import SPLITS, Batch, Split, SplitName

_TOKENS_AT_ONCE = 512
"""Tokens whose logits lie in memory together while a model is judged or asked for gradients: 100 MB for 49k words."""


class WindowSplit:
    """Windows of token ids [len, T]; the target of every position is the token that follows."""

    def __init__(self, windows: Tensor) -> None:
        """Keeps the windows.

        Args:
            windows: int64 [len, T].

        Raises:
            DataError: not such a tensor, or windows of fewer than two tokens.
        """
        if windows.dim() != 2 or windows.shape[1] < 2 or windows.dtype != torch.int64:
            raise DataError(
                f"windows of tokens are int64 [number, tokens], at least two tokens each, not "
                f"{windows.dtype} {list(windows.shape)}: a window predicts every token from those before it"
            )
        self._windows = windows.contiguous()
        self.largest_batch = max(1, _TOKENS_AT_ONCE // windows.shape[1])

    @property
    def targets(self) -> Tensor:
        """int64 [len, T]; -100 at the last position, whose successor lies in another window."""
        return _following(self._windows)

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every window."""
        return [hashlib.blake2b(window.numpy().tobytes(), digest_size=16).digest() for window in self._windows]

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The windows at `indices`."""
        chosen = self._windows[torch.as_tensor(indices)]
        return Batch((chosen,), _following(chosen))


def _following(windows: Tensor) -> Tensor:
    """The token after each of int64 [N, T]; -100 at the end of a window."""
    following = windows.roll(-1, dims=1)
    following[:, -1] = IGNORED
    return following


class CausalLM:
    """Next-token prediction; a `Task` without classes, judged by perplexity.

    Args:
        splits: per name windows of token ids, int64 [number, T].
        vocabulary: number of tokens the tokenizer knows.
        name: for reports.
        provenance: where text and tokenizer come from, JSON.
        tokenizer: what made the tokens, as the text of a tokenizer.json; goes into the bundle of a generator.
        file_digests: files that were read, see `pipeline.task.FromFiles`; a run stops when one is edited.

    Raises:
        DataError: an unknown split name, an empty split, or a token outside the vocabulary.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Tensor],
        vocabulary: int,
        *,
        name: str = "causal_lm",
        provenance: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        file_digests: Mapping[Path, str] | None = None,
    ) -> None:
        self._splits: dict[SplitName, Split] = {}
        for key, windows in splits.items():
            if key not in SPLITS:
                raise DataError(f"unknown split {key!r}; there are {', '.join(SPLITS)}")
            if len(windows) == 0:
                raise DataError(f"split {key!r} has no window: leave it out, shorten the windows or add text")
            if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
                raise DataError(
                    f"split {key!r} has the token {int(windows.max())}, and the vocabulary has {vocabulary}: use the "
                    "tokenizer that belongs to the model"
                )
            self._splits[key] = WindowSplit(windows)
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self._name, self._provenance = name, dict(provenance or {})
        self._file_digests = dict(file_digests or {})

    @property
    def name(self) -> str:
        """A short name for reports."""
        return self._name

    @property
    def labels(self) -> tuple[str, ...]:
        """None: tokens are no classes to report on one by one."""
        return ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Token ids."""
        return ("input_ids",)

    @property
    def dynamic_axes(self) -> tuple[Mapping[int, str], ...]:
        """Any number of rows, of any length."""
        return ({0: "batch", 1: "sequence"},)

    @property
    def preprocessing(self) -> Preprocessing:
        """None: token ids are the input."""
        return Preprocessing()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where text and tokenizer come from."""
        return self._provenance

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """Files of text and tokenizer."""
        return self._file_digests

    @property
    def splits(self) -> Mapping[SplitName, Split]:
        """The splits that exist."""
        return self._splits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy per predicted token: logits [N, T, V], targets [N, T]."""
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    @property
    def metric(self) -> Metric:
        """Perplexity."""
        return Perplexity()

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Nothing."""
        del generator
        return batch


def windows_of(
    tokens: Tensor,
    window: int,
    fractions: Mapping[SplitName, float],
    most: Mapping[SplitName, int] | None = None,
) -> dict[SplitName, Tensor]:
    """Cuts a text into windows that follow each other, and gives every split a stretch of them, in order.

    A window whose content an earlier split has already is left out, so that nothing is judged on what it was
    fitted to.

    Args:
        tokens: int64 [number].
        window: tokens per window; what is left over at the end is dropped.
        fractions: share of the windows per split; their sum is at most 1. The order of the splits is theirs.
        most: keep at most so many windows of a split, spread evenly over its stretch.

    Raises:
        DataError: shares that make no sense, or a split without a window.
    """
    if window < 2 or any(share <= 0.0 for share in fractions.values()) or sum(fractions.values()) > 1.0 + 1e-9:
        raise DataError(f"windows of {window} tokens with shares {dict(fractions)}: at least 2 tokens, shares sum to 1")
    count = len(tokens) // window
    whole = tokens[: count * window].reshape(count, window)
    found: dict[SplitName, Tensor] = {}
    seen: set[bytes] = set()
    start, share = 0, 0.0
    for name, part in fractions.items():
        share += part
        stop = round(count * share)
        rows = [row for row in range(start, stop) if whole[row].numpy().tobytes() not in seen]
        start = stop
        limit = (most or {}).get(name)
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        if not rows and round(count * (share - part)) < stop:
            raise DataError(
                f"every window of split {name!r} has the very tokens of a window of an earlier split: the text repeats "
                "itself, or the tokenizer does not know it and gives one token for everything"
            )
        if not rows:
            raise DataError(
                f"the text has {count} windows of {window} tokens, and the share {part} of split {name!r} is none: "
                "give more text, shorter windows or a larger share"
            )
        found[name] = whole[rows]
        seen.update(whole[row].numpy().tobytes() for row in rows)
    return found
