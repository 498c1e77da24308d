"""Sentences of made-up words, to try recipes for texts on: which class one has, its order decides."""

from __future__ import annotations

import torch

from ...errors import DataError
from ..image_classification import ImageClassification

_LABELS = ("good", "bad", "mixed")
_GOOD, _BAD, _NOT, _FIRST_FILLER = range(1, 9), range(9, 17), 17, 18


def synthetic_text(
    seed: int = 0, rows: int = 2400, window: int = 16, vocabulary: int = 64, fillers: float = 0.6
) -> ImageClassification:
    """Token ids [window], 0 is padding: words of praise and of blame, each turned round by a "not" right before it.

    The classes have the same words, so that counting them does not tell: a network has to see what stands before what.

    Args:
        seed: of the sentences.
        rows: of all splits together.
        window: tokens of the longest sentence.
        vocabulary: number of tokens.
        fillers: share of the free places that are filled with words that mean nothing.

    Raises:
        DataError: too few rows, tokens or words.
    """
    if not isinstance(rows, int) or rows < 60 or window < 6 or vocabulary <= _FIRST_FILLER + 1 or not 0 <= fillers <= 1:
        raise DataError(
            f"rows {rows}, window {window}, vocabulary {vocabulary}, fillers {fillers}: give at least 60 rows, a "
            f"window of 6, {_FIRST_FILLER + 2} tokens, and a share of fillers"
        )
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    sentences = torch.zeros(rows, window, dtype=torch.int64)
    classes = torch.arange(rows) % len(_LABELS)
    for row, label in enumerate(classes.tolist()):
        wanted = [1, 1] if label == 0 else [0, 0] if label == 1 else [1, 0]
        words: list[list[int]] = []
        for good in wanted:
            turned = number(2) == 1
            word = (_GOOD if bool(good) != turned else _BAD)[number(8)]
            words.append([_NOT, word] if turned else [word])
        room = int(fillers * (window - sum(map(len, words))))
        while room > 0:
            # a "not" before a word that means nothing turns nothing
            turned = room > 1 and number(3) == 0
            filler = _FIRST_FILLER + number(vocabulary - _FIRST_FILLER)
            words.append([_NOT, filler] if turned else [filler])
            room -= len(words[-1])
        order = torch.randperm(len(words), generator=generator).tolist()
        flat = [token for place in order for token in words[place]]
        sentences[row, : len(flat)] = torch.tensor(flat)
    return ImageClassification.from_arrays(
        sentences, classes, _LABELS, seed=seed, name="synthetic_text", input_name="input_ids"
    )
