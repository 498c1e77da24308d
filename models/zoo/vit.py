"""A small vision transformer with separate query, key, value and output projections."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v read the same tensor through layers of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width] -> [N, T, width]``."""
        q, k, v = (m(x).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer: attention and a two-layer MLP, both residual."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width] -> [N, T, width]``."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Patches, learned positions, layers, pooled tokens, one linear layer; see `vit_small`."""

    def __init__(
        self, image_size: int, patch: int, width: int, depth: int, heads: int, hidden: int, classes: int,
        in_channels: int, pool: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pool = pool
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        tokens = (image_size // patch) ** 2 + (pool == "token")
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "token" else None
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, image_size, image_size] -> [N, classes]``."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.layers(x + self.positions))
        x = x[:, 0] if self.pool == "token" else x.mean(dim=1)
        logits: Tensor = self.classifier(x)
        return logits


def vit_small(
    image_size: int = 32,
    patch: int = 4,
    width: int = 128,
    depth: int = 6,
    heads: int = 4,
    classes: int = 10,
    in_channels: int = 3,
    hidden: int | None = None,
    pool: Literal["mean", "token"] = "mean",
) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al., arXiv 2010.11929), pre-norm.

    Args:
        image_size: side of the square image, a multiple of `patch`.
        patch: side of a patch in pixels.
        width: of the token stream, a multiple of `heads`.
        depth: number of layers.
        heads: of the attention.
        classes: number of logits.
        in_channels: of the image [N, in_channels, image_size, image_size].
        hidden: width of the MLP, default four times `width`.
        pool: ``mean`` over the tokens, or a class ``token``.

    Raises:
        ValueError: sizes that do not divide, or an unknown pool.
    """
    if image_size % patch:
        raise ValueError(f"image_size {image_size} is not a multiple of patch {patch}")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    if pool not in ("mean", "token"):
        raise ValueError(f"unknown pool {pool!r}; there are: mean, token")
    hidden = 4 * width if hidden is None else hidden
    return VisionTransformer(image_size, patch, width, depth, heads, hidden, classes, in_channels, pool)
