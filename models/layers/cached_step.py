"""A causal language model with its cache as plain tensors: one call that prefills, continues or decodes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..sources.generating import refuse_without_cache
from ..sources.pretrained import LogitsOnly


class CachedStep(nn.Module):
    """``(input_ids, attention_mask, past...) -> (logits, present...)``.

    `past` and `present` are keys and values of every layer in turn, ``[N, heads, tokens, width]``; `past` has no
    tokens at the start. Rows of different length are padded on the left, with zeros in the mask.
    """

    def __init__(self, model: LogitsOnly) -> None:
        """Wraps `model`, factorized or not.

        Args:
            model: a causal language model.

        Raises:
            ValueError: it keeps no cache of keys and values alone; says what it is.
        """
        super().__init__()
        refuse_without_cache(model.model)
        # kept whole, so that weights are called as in its checkpoints
        self.model = model
        self.positions = "position_ids" in inspect.signature(model.model.forward).parameters
        self._past: tuple[Tensor, ...] | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """One step.

        Args:
            input_ids: int64 [N, S], the new tokens.
            attention_mask: int64 [N, P + S], ones for the tokens that count.
            past: per layer keys and values [N, heads, P, width].

        Returns:
            Logits [N, S, V], then per layer keys and values [N, heads, P + S, width].
        """
        from transformers import DynamicCache

        pairs = list(zip(past[::2], past[1::2], strict=True))
        options = {}
        if self.positions:
            # padding has no position; what is written where it lies does not count
            counted = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            options["position_ids"] = counted[:, counted.shape[1] - input_ids.shape[1] :]
        output = self.model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(pairs) if pairs else DynamicCache(),
            use_cache=True,
            **options,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)

    @torch.no_grad()
    def empty_past(self, rows: int) -> tuple[Tensor, ...]:
        """A past without tokens for `rows` rows."""
        if self._past is None:
            token = torch.zeros(1, 1, dtype=torch.int64)
            present = self(token, torch.ones_like(token))[1:]
            self._past = tuple(x[:, :, :0].clone() for x in present)
        return tuple(x.expand(rows, -1, -1, -1) for x in self._past)
