"""Window attention whose heads can be taken: what torchvision's Swin Transformers compute, in both versions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

# by name, because importing torchvision takes longer than everything else here
_CLOSED = tuple(f"torchvision.models.swin_transformer.ShiftedWindowAttention{kind}" for kind in ("", "V2"))


class OpenWindowAttention(nn.Module):
    """Self-attention in shifted windows with four linear layers, and any number of heads of `head_width` channels.

    torchvision's own keeps three projections in one layer, reads that layer's weight without calling it, and shapes its
    tensors by the width of its input, so no head can be taken from it. Built by `of`.

    Args:
        width: channels of input and output.
        heads: number of heads.
        head_width: channels of each.
        window: rows and columns of a window.
        shift: rows and columns that windows are shifted by.
        dropout: probabilities, in training mode, of leaving out an attention weight, and an output.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, window: tuple[int, int], shift: tuple[int, int],
        dropout: tuple[float, float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_width, self.window, self.shift, self.dropout = head_width, window, shift, dropout
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width) for _ in range(3))
        self.out = nn.Linear(heads * head_width, width)
        self.relative_position_index: Tensor
        self.bias_table: nn.Parameter | None = None
        self.logit_scale: nn.Parameter | None = None
        self.bias_network: nn.Module | None = None
        self.coordinates: Tensor

    @staticmethod
    def can_open(module: nn.Module) -> bool:
        """Whether `module` is torchvision's."""
        return f"{type(module).__module__}.{type(module).__qualname__}" in _CLOSED

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> OpenWindowAttention:
        """One that computes what `module`, see `can_open`, computes, with copies of its weights."""
        cosine = hasattr(module, "cpb_mlp")
        width, heads = module.proj.out_features, module.num_heads
        rows, columns = module.window_size
        down, right = module.shift_size
        new = cls(
            width, heads, width // heads, (rows, columns), (down, right), (module.attention_dropout, module.dropout)
        )
        fused = module.qkv
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        # cosine attention has no bias of the keys, whatever the parameter holds
        biases = (biases[0], None, biases[2]) if cosine else biases
        for layer, weight, bias in zip(
            (new.q, new.k, new.v, new.out),
            (*fused.weight.chunk(3), module.proj.weight),
            (*biases, module.proj.bias),
            strict=True,
        ):
            layer.weight = nn.Parameter(weight.clone())
            layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
        new.register_buffer("relative_position_index", module.relative_position_index.clone())
        if cosine:
            new.logit_scale = nn.Parameter(module.logit_scale.clone())
            new.bias_network = module.cpb_mlp
            new.register_buffer("coordinates", module.relative_coords_table.clone())
        else:
            new.bias_table = nn.Parameter(module.relative_position_bias_table.clone())
        return new.to(fused.weight).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Attends within windows.

        Args:
            x: [N, H, W, channels].

        Returns:
            The same shape.
        """
        rows, columns = self.window
        height, width = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        high, wide = x.shape[1:3]
        # a window as large as the image is never shifted
        down, right = (self.shift[0] if rows < high else 0), (self.shift[1] if columns < wide else 0)
        if down or right:
            x = torch.roll(x, (-down, -right), (1, 2))
        down_by, wide_by = high // rows, wide // columns
        windows = x.reshape(-1, down_by, rows, wide_by, columns, x.shape[3]).transpose(2, 3)
        tokens = windows.flatten(3, 4).flatten(1, 2)  # [N, windows, tokens, channels]
        mask = self._mask(high, wide, down, right, x) if down or right else None
        y = nn.functional.dropout(self._attend(tokens, mask), self.dropout[1], self.training)
        y = y.reshape(-1, down_by, wide_by, rows, columns, y.shape[3]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if down or right:
            y = torch.roll(y, (down, right), (1, 2))
        return y[:, :height, :width]

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """[N, windows, tokens, channels]; `mask` [windows, 1, tokens, tokens] is added to the scores."""
        q, k, v = (
            layer(tokens).reshape(*tokens.shape[:3], -1, self.head_width).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        if self.logit_scale is None:
            scores = q * self.head_width**-0.5 @ k.transpose(-2, -1)
        else:
            scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * self.logit_scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self._position_bias(tokens.shape[2])
        if mask is not None:
            scores = scores + mask
        shares = nn.functional.dropout(scores.softmax(dim=-1), self.dropout[0], self.training)
        out: Tensor = self.out((shares @ v).transpose(2, 3).flatten(3))
        return out

    def _position_bias(self, tokens: int) -> Tensor:
        """[heads, tokens, tokens]."""
        table = self.bias_table if self.bias_network is None else self.bias_network(self.coordinates).flatten(0, -2)
        assert table is not None
        bias = table[self.relative_position_index].reshape(tokens, tokens, -1).movedim(-1, 0)
        return bias if self.bias_network is None else 16.0 * torch.sigmoid(bias)

    def _mask(self, high: int, wide: int, down: int, right: int, like: Tensor) -> Tensor:
        """[windows, 1, tokens, tokens]: -100 between tokens that only the shift brought into one window."""
        rows, columns = self.window
        # 0 in front of the last window, 1 in it, 2 in what was rolled over from the other side
        across = [torch.arange(size, device=like.device) for size in (high, wide)]
        vertical, horizontal = (
            (place >= size - window).to(like.dtype) + (place >= size - shift).to(like.dtype) * bool(shift)
            for place, size, window, shift in zip(across, (high, wide), self.window, (down, right), strict=True)
        )
        region = 3.0 * vertical[:, None] + horizontal[None, :]
        parts = region.reshape(high // rows, rows, wide // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
        mask: Tensor = (parts[:, None, :] != parts[:, :, None]).to(like.dtype)[:, None] * -100.0
        return mask
