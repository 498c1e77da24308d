from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from edgewright.models.layers.window_attention import OpenWindowAttention


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(
    ("window", "shift", "size"),
    [((4, 4), (2, 2), (8, 8)), ((4, 4), (0, 0), (9, 11)), ((4, 4), (2, 2), (3, 12)), ((7, 5), (3, 0), (14, 7))],
)
def test_answers_like_the_original(
    kind: type[ShiftedWindowAttention], window: tuple[int, int], shift: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    closed = kind(24, list(window), list(shift), 3).eval()
    with torch.no_grad():
        for value in closed.parameters():
            nn.init.normal_(value, std=0.3)
        x = torch.randn(2, *size, 24)
        opened = OpenWindowAttention.of(closed)
        torch.testing.assert_close(opened(x), closed(x), atol=1e-5, rtol=1e-5)
    assert OpenWindowAttention.can_open(closed) and not OpenWindowAttention.can_open(opened)
