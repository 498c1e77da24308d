"""Models that answer a row otherwise in eval mode, for three reasons."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from edgewright.pipeline import ImageClassification
from edgewright.pipeline.errors import ModelError
from edgewright.pipeline.runs.model_check import check_model

labels = torch.arange(120) % 3
images = torch.randn(120, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None]
task = ImageClassification.from_arrays(images, labels, ["a", "b", "c"])


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(2, 8, 3), middle, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).relu().mean((2, 3))))


class Latent(nn.Module):
    """Mean and variance, and a draw from them."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.mean(x) + self.spread(x).exp() * torch.randn(len(x), 8)


class MovingRange(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("high", torch.full((), 0.1))

    def forward(self, x):
        self.high.lerp_(x.detach().amax(), 0.2)
        return x / self.high


class AlwaysDropping(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p)


class TrainedNorm(nn.BatchNorm2d):
    """Stays in training mode."""

    def train(self, mode=True):
        return super().train(True)


class Spatial(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, :, None, None].expand(-1, -1, 2, 2) * torch.linspace(1, 2, 4).view(2, 2)).mean((2, 3))


def fake_quantized():
    quantize = torch.ao.quantization.FakeQuantize.with_args(
        observer=torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, averaging_constant=0.5
    )
    return quantize()


KINDS = {
    "dropout": (lambda: AlwaysDropping(0.4), ["random numbers", "'middle'"]),
    "latent": (Latent, ["random numbers", "'middle'"]),
    "gumbel": (lambda: Gumbel(), ["random numbers", "'middle'"]),
    "observer": (MovingRange, ["changes its own state at every call", "middle.high"]),
    "fake_quantize": (fake_quantized, ["changes its own state at every call", "'middle"]),
    "norm_in_training_mode": (lambda: Spatial(TrainedNorm(8)), ["mixes the rows", "'middle.layer'"]),
}


class Gumbel(nn.Module):
    def forward(self, x):
        return F.gumbel_softmax(x, tau=0.5)


for name, (middle, words) in KINDS.items():
    torch.manual_seed(0)
    try:
        check_model(Net(middle()).eval(), task, "net")
        print(f"wrong {name}: accepted")
    except ModelError as error:
        text = " ".join(str(error).split())
        only = "mixes" in words[0] or "mixes" not in text
        print("right" if only and all(word in text for word in words) else "wrong", f"{name}: {text[:300]}")
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {error}")
