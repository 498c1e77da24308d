"""Things seen from several sides, made up: to try recipes for embeddings on."""

from __future__ import annotations

import torch

from ...errors import DataError
from ..embedding import Embedding


def synthetic_embedding(
    seed: int = 0, things: int = 120, views: int = 6, noise: float = 0.05, metric: str = "recall@1"
) -> Embedding:
    """Rows [16] of things that differ in four hidden numbers, mixed with six others that change from view to view.

    The rows themselves are of little use: the numbers that change are the larger ones. The things of one split are not
    those of another.

    Args:
        seed: of things, views and how they are mixed.
        things: of all splits together.
        views: rows of each thing.
        noise: standard deviation of what cannot be undone.
        metric: ``recall@K``.

    Raises:
        DataError: too few things or views.
    """
    if not isinstance(things, int) or not isinstance(views, int) or things < 20 or views < 2:
        raise DataError(
            f"there are {things} things with {views} views: give at least 20 with 2, so that splits have some"
        )
    generator = torch.Generator().manual_seed(seed)
    thing = torch.randn(things, 4, generator=generator).repeat_interleave(views, dim=0)
    view = 1.5 * torch.randn(things * views, 6, generator=generator)
    mix = torch.randn(10, 16, generator=generator) / 10**0.5
    x = torch.tanh(torch.cat([thing, view], dim=1) @ mix) + noise * torch.randn(things * views, 16, generator=generator)
    labels = torch.arange(things).repeat_interleave(views)
    return Embedding.from_labels(x, labels, apart=True, seed=seed, metric=metric, name="synthetic_embedding")
