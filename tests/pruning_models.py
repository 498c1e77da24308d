"""Small models with what strangers' models have: gates, concatenations, groups, shuffles, plain parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import CLASSES, tiny_residual, tiny_transformer
from torch import Tensor, nn


class Patchwork(nn.Module):
    """Depthwise, grouped, concatenated, gated and scaled convolutions, then flatten and Linear; [N, 1, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.expand = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(12, 24, 3, 1, 1, groups=12), nn.GroupNorm(1, 24), nn.ReLU6())
        self.squeeze, self.excite = nn.Linear(24, 6), nn.Linear(6, 24)
        self.left = nn.Conv2d(24, 10, 1)
        self.right = nn.Sequential(nn.Conv2d(24, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1, groups=3), nn.ReLU())
        self.scale = nn.Parameter(torch.rand(22, 1, 1) + 0.5)
        self.merge = nn.Sequential(nn.BatchNorm2d(22), nn.Hardswish(), nn.ConvTranspose2d(22, 9, 2))
        self.hidden = nn.Sequential(nn.Linear(9 * 9, 16), nn.LayerNorm(16), nn.GELU(), nn.BatchNorm1d(16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(self.stem(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(dim=(2, 3))))))
        y = y * gate[:, :, None, None]
        y = self.merge(torch.cat([self.left(y), self.right(y)], dim=1) * self.scale)
        logits: Tensor = self.fc(self.hidden(nn.functional.max_pool2d(y, 2).flatten(1)))
        return logits


class GatedUnits(nn.Module):
    """A gated MLP (SwiGLU) with a residual stream normalised by the model's own RMS norm; [N, 1, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(144, 10)
        self.gain = nn.Parameter(torch.ones(10))
        self.gate, self.up, self.down = nn.Linear(10, 14), nn.Linear(10, 14), nn.Linear(14, 10)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1))
        z = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6) * self.gain
        h = h + self.down(nn.functional.silu(self.gate(z)) * self.up(z))
        logits: Tensor = self.fc(h)
        return logits


class WrittenWidth(nn.Module):
    """The second convolution's width is written into forward, and channels are shuffled behind the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x)))).view(-1, 8, 9).unflatten(2, (3, 3))
        y = torch.relu(self.c(y))
        y = y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        logits: Tensor = self.fc(torch.relu(self.d(y)).mean(dim=(2, 3)))
        return logits


class TwoInputs(nn.Module):
    """An image and a vector, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(5, 8)
        self.hidden, self.fc = nn.Linear(16, 12), nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.conv(image)).mean(dim=(2, 3)), torch.relu(self.side(vector))], dim=1)
        logits: Tensor = self.fc(torch.relu(self.hidden(y)))
        return logits


def lively(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose normalisations are not the identity, eval mode."""
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": tiny_residual,
    "transformer": tiny_transformer,
    "patchwork": lambda: lively(Patchwork),
    "gated": lambda: lively(GatedUnits),
    "written_width": lambda: lively(WrittenWidth),
}
"""All take [N, 1, 12, 12]."""
