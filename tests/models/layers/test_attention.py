from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgewright.models.layers.attention import OpenAttention

PADDING = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 10}],
    ids=["plain", "rows", "bare", "cross"],
)
def test_computes_what_pytorch_computes(options: dict[str, Any], need_weights: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, **options).eval()
    for value in theirs.parameters():
        nn.init.normal_(value, std=0.5)
    ours = OpenAttention.of(theirs)
    query, key, value = (
        torch.randn(2, 4, 12),
        torch.randn(2, 5, options.get("kdim", 12)),
        torch.randn(2, 5, options.get("vdim", 12)),
    )
    if not options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    mask = torch.zeros(4, 5).masked_fill(torch.rand(4, 5) < 0.3, float("-inf"))
    mask[:, 0] = 0.0
    for masks in ({}, {"attn_mask": mask}, {"attn_mask": mask.isinf(), "key_padding_mask": PADDING}):
        with torch.no_grad():
            out, shares = ours(query, key, value, need_weights=need_weights, **masks)
            expected, theirs_shares = theirs(query, key, value, need_weights=need_weights, **masks)
        assert torch.allclose(out, expected, atol=1e-5)
        assert (shares is None) == (theirs_shares is None)
        assert shares is None or torch.allclose(shares, theirs_shares, atol=1e-5)


def test_takes_the_place_in_a_transformer_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True).eval()
    x = torch.randn(2, 4, 12)
    with torch.no_grad():
        expected = layer(x)
        layer.self_attn = OpenAttention.of(layer.self_attn)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert layer.self_attn.num_heads == 3


def test_what_it_cannot_do_is_said() -> None:
    assert not OpenAttention.can_open(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert not OpenAttention.can_open(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    ours = OpenAttention.of(nn.MultiheadAttention(8, 2))
    x = torch.randn(3, 1, 8)
    with pytest.raises(ValueError, match="mask for every head"):
        ours(x, x, x, attn_mask=torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="is_causal"):
        ours(x, x, x, is_causal=True)
