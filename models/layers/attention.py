"""Multi-head attention whose heads are where everybody can see them: what `nn.MultiheadAttention` computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OpenAttention(nn.Module):
    """`nn.MultiheadAttention` with four ordinary linear layers, and any number of heads of `head_width` channels.

    PyTorch's own keeps the weights of three projections in one parameter and its width equal to the embedding's, so no
    head can be taken from it. This one is called and answers like it, dropout included.

    Args:
        embed: channels of query and output.
        keys: channels of the keys.
        values: channels of the values.
        heads: number of heads.
        head_width: channels of each.
        bias: whether the linear layers have one.
        dropout: probability, in training mode, of leaving an attention weight out.
        batch_first: inputs are [N, T, channels], else [T, N, channels].
    """

    def __init__(
        self, embed: int, keys: int, values: int, heads: int, head_width: int, bias: bool, dropout: float,
        batch_first: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_width, self.dropout, self.batch_first = head_width, dropout, batch_first
        self.q = nn.Linear(embed, heads * head_width, bias)
        self.k = nn.Linear(keys, heads * head_width, bias)
        self.v = nn.Linear(values, heads * head_width, bias)
        self.out = nn.Linear(heads * head_width, embed, bias)
        # nn.TransformerEncoderLayer asks for these before it takes its fused path, which reads the fused parameter
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False

    @staticmethod
    def can_open(module: nn.Module) -> bool:
        """Whether `module` is a `nn.MultiheadAttention` without keys or values of its own."""
        return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> OpenAttention:
        """One that computes what `module`, see `can_open`, computes, with copies of its weights."""
        bias = module.in_proj_bias is not None
        new = cls(
            module.embed_dim, module.kdim or module.embed_dim, module.vdim or module.embed_dim, module.num_heads,
            module.head_dim, bias, module.dropout, module.batch_first,
        )  # fmt: skip
        fused = module.in_proj_weight
        weights = fused.chunk(3) if fused is not None else (
            module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        )  # fmt: skip
        biases = module.in_proj_bias.chunk(3) if bias else (None, None, None)
        out = module.out_proj
        for layer, weight, shift in zip(
            (new.q, new.k, new.v, new.out), (*weights, out.weight), (*biases, out.bias), strict=True
        ):
            layer.weight.copy_(weight)
            if shift is not None:
                layer.bias.copy_(shift)
        return new.to(out.weight).train(module.training)

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return self.q.out_features // self.head_width

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, for batches, with a mask for all heads; see there."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: give the mask as well")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _merged(attn_mask, key_padding_mask, q.dtype)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_width**-0.5
            shares = (scores if mask is None else scores + mask).softmax(dim=-1)
            y = nn.functional.dropout(shares, self.dropout, self.training) @ v
        else:
            shares = None
            dropout = self.dropout if self.training else 0.0
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out(y.transpose(1, 2).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(dim=1)
        return out if self.batch_first else out.transpose(0, 1), shares


def _merged(attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to scores [N, heads, T, S]."""
    if attn_mask is not None and attn_mask.dim() != 2:
        raise ValueError("a mask for every head by itself does not go with heads that can be removed: give one [T, S]")
    whole = None
    for mask, shape in ((attn_mask, (1, 1, -1)), (padding, (-1, 1, 1))):
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
            mask = mask.view(*shape, mask.shape[-1])
            whole = mask if whole is None else whole + mask
    return whole
