# ruff: noqa: D102 - every forward says what its class says
"""Networks of `architectures.py` that no library has: each for one thing that models of strangers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY = 4, 96


class Leaves(nn.Module):
    """A model of transformers, called positionally: one leaf of what it returns, or a mapping of several."""

    def __init__(self, model: nn.Module, leaves: Sequence[str]) -> None:
        super().__init__()
        self.model, self.leaves = model, list(leaves)
        self.model.config.use_cache = False
        self.named = getattr(model, "main_input_name", "input_ids")

    def forward(self, first: Tensor, mask: Tensor | None = None) -> Any:
        """Float tensors."""
        given = {self.named: first} if mask is None else {self.named: first, "attention_mask": mask}
        output = self.model(**given)
        if len(self.leaves) == 1:
            return output[self.leaves[0]]
        return {leaf: output[leaf] for leaf in self.leaves}


class Sequences(nn.Module):
    """An encoder-decoder with both of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.model.config.use_cache = False
        self.named = model.main_input_name

    def forward(self, first: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits [N, T, V]."""
        logits: Tensor = self.model(**{self.named: first}, decoder_input_ids=decoder_input_ids).logits
        return logits


def whisper() -> nn.Module:
    """A tiny Whisper."""
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=32,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return Sequences(transformers.WhisperForConditionalGeneration(config))


def t5() -> nn.Module:
    """A tiny T5."""
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return Sequences(transformers.T5ForConditionalGeneration(config))


class two_stage(nn.Module):
    """Faster R-CNN, whole: its proposals depend on data."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

        # training mode would want targets
        self.model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Boxes and scores of the first image."""
        found = self.model(list(image))[0]
        return torch.cat([found["boxes"], found["scores"][:, None]], dim=1)


def convolutional(channels: int = 3, width: int = 16, classes: int = CLASSES) -> nn.Sequential:
    """Three convolutions and a head."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class _C2f(nn.Module):
    """Split, a chain of residual blocks, and everything concatenated."""

    def __init__(self, given: int, gives: int, count: int = 1) -> None:
        super().__init__()
        self.half = gives // 2
        self.first = _conv(given, gives, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(self.half, self.half, 3), _conv(self.half, self.half, 3)) for _ in range(count)
        )
        self.last = _conv((2 + count) * self.half, gives, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        y: Tensor = self.last(torch.cat(parts, dim=1))
        return y


class _SPPF(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = _conv(width, width // 2, 1), _conv(2 * width, width, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        y: Tensor = self.last(torch.cat(parts, dim=1))
        return y


def _conv(given: int, gives: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, gives, size, stride, size // 2, bias=False), nn.BatchNorm2d(gives), nn.SiLU())


class C2fClassifier(nn.Module):
    """As YOLOv8's classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(3, 16, 3, 2), _conv(16, 32, 3, 2), _C2f(32, 32), _conv(32, 64, 3, 2), _C2f(64, 64), _SPPF(64)
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return y


class C2fDetector(nn.Module):
    """As YOLOv8's detector, two strides: [N, A, 4 + C]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), _C2f(32, 32))
        self.deep = nn.Sequential(_conv(32, 64, 3, 2), _C2f(64, 64), _SPPF(64))
        self.up, self.mix = nn.Upsample(scale_factor=2), _C2f(96, 32)
        self.heads = nn.ModuleList([nn.Conv2d(32, 4 + classes, 1), nn.Conv2d(64, 4 + classes, 1)])

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.stem(x)
        deep = self.deep(shallow)
        fine = self.mix(torch.cat([self.up(deep), shallow], dim=1))
        found = [head(y).flatten(2) for head, y in zip(self.heads, (fine, deep), strict=True)]
        return torch.cat(found, dim=2).transpose(1, 2)


class BytesIn(nn.Module):
    """Takes uint8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutional()

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.net(image.float() / 255.0)
        return y


class Fourier(nn.Module):
    """Magnitudes of a real FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(torch.fft.rfft(x).abs())
        return y


class Spectrogram(nn.Module):
    """An STFT in front of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutional(1)
        self.register_buffer("window", torch.hann_window(64))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stft(x, 64, 32, window=self.window, return_complex=True).abs()
        y: Tensor = self.net(found[:, None])
        return y


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ScriptedFunction(nn.Module):
    """Calls a scripted function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 16, 3, padding=1), convolutional(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(_scripted(self.first(x)))
        return y


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class OwnGradient(nn.Module):
    """A straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 16, 3, padding=1), convolutional(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(_Clamp.apply(self.first(x)))
        return y


class SpatialTransformer(nn.Module):
    """Warps its input by an affine map that it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.net = convolutional(3, 8, 6), convolutional()

    def forward(self, x: Tensor) -> Tensor:
        theta = self.locate(x).view(-1, 2, 3) * 0.1 + torch.eye(2, 3)
        grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
        y: Tensor = self.net(nn.functional.grid_sample(x, grid, align_corners=False))
        return y


class Stubs(nn.Module):
    """Prepared for eager quantization, with stubs and float functions."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.net = convolutional()
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(self.quant(x))
        z: Tensor = self.dequant(self.add.add(y, y))
        return z


class TextCNN(nn.Module):
    """Convolutions over embeddings, the largest over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.convs = nn.ModuleList(nn.Conv1d(32, 32, size, padding=size // 2) for size in (3, 5))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        y: Tensor = self.head(torch.cat([conv(x).relu().amax(dim=2) for conv in self.convs], dim=1))
        return y


class SoftMixture(nn.Module):
    """All experts, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, CLASSES)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(dim=1)
        found = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (found * weights[:, :, None]).sum(dim=1)


class GraphScatter(nn.Module):
    """Messages along fixed edges, added up by scatter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("edges", torch.randint(12, (2, 40), generator=generator))
        self.message, self.head = nn.Linear(16, 32), nn.Linear(32, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        sent = self.message(nodes[:, self.edges[0]]).relu()
        into = self.edges[1][None, :, None].expand(len(nodes), -1, sent.shape[2])
        got = torch.zeros(len(nodes), 12, sent.shape[2]).scatter_add(1, into, sent)
        y: Tensor = self.head(got.mean(dim=1))
        return y


class Encoder(nn.Module):
    """PyTorch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean(dim=1))
        return y


class CRNN(nn.Module):
    """Reads text off a line: convolutions, then an LSTM over the columns; [N, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.rnn, self.head = nn.LSTM(32 * 16, 32, bidirectional=True, batch_first=True), nn.Linear(64, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(1, 2).transpose(1, 2)
        z: Tensor = self.head(self.rnn(y)[0])
        return z


class Recurrent(nn.Module):
    """Two layers of an LSTM or a GRU; the last state is classified."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(16, 64, num_layers=2, batch_first=True), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


class TCN(nn.Module):
    """Dilated causal convolutions with weight norm."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        wrap = nn.utils.weight_norm if norm == "old" else nn.utils.parametrizations.weight_norm
        self.first = wrap(nn.Conv1d(8, 32, 3, padding=2, dilation=1))
        self.second = wrap(nn.Conv1d(32, 32, 3, padding=4, dilation=2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[:, :, : x.shape[2]].relu()
        y = self.second(y)[:, :, : x.shape[2]].relu()
        z: Tensor = self.head(y.mean(dim=2))
        return z


class SpectralNorm(nn.Module):
    """A discriminator."""

    def __init__(self) -> None:
        super().__init__()
        wrap = nn.utils.parametrizations.spectral_norm
        self.first, self.second = wrap(nn.Conv2d(3, 16, 3, padding=1)), wrap(nn.Conv2d(16, 32, 3, padding=1))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x).relu()).relu().mean(dim=(2, 3)))
        return y


class Siamese(nn.Module):
    """One network on both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = convolutional(3, 16, 32), nn.Linear(64, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        y: Tensor = self.head(torch.cat([self.tower(left), self.tower(right)], dim=1))
        return y


class UsedTwice(nn.Module):
    """A block that is called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = (y + self.block(y)).relu()
        y = (y + self.block(y)).relu()
        z: Tensor = self.head(y.mean(dim=(2, 3)))
        return z


class DLRM(nn.Module):
    """Dense features beside bags of categories, and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(VOCABULARY, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        products = rows @ rows.transpose(1, 2)
        upper = torch.triu_indices(4, 4, 1)
        y: Tensor = self.top(torch.cat([x, products[:, upper[0], upper[1]]], dim=1))
        return y


class Deformable(nn.Module):
    """A deformable convolution between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.stem, self.offset = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 18, 3, padding=1)
        self.deform, self.rest = DeformConv2d(16, 32, 3, padding=1), convolutional(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        z: Tensor = self.rest(self.deform(y, self.offset(y)).relu())
        return z


class UNet(nn.Module):
    """Two scales with a skip; a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _conv(3, 16, 3), _conv(16, 32, 3, 2)
        self.middle, self.up = _conv(32, 32, 3), nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Sequential(_conv(32, 16, 3), nn.Conv2d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        y: Tensor = self.last(torch.cat([self.up(self.middle(self.down2(skip))), skip], dim=1))
        return y


class SuperResolution(nn.Module):
    """Twice as many pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.body(x)) + nn.functional.interpolate(x, scale_factor=2.0)
        return y


class Autoencoder(nn.Module):
    """Through a narrow middle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 8, 1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 32, 2, 2), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


class VAE(nn.Module):
    """Samples in training, gives the mean in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 16 * 64), nn.ReLU(), nn.Unflatten(1, (16, 8, 8)))
        self.last = nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * spread.exp() if self.training else mean
        y: Tensor = self.last(self.decoder(z))
        return y


class MultiTask(nn.Module):
    """Two heads, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.kind, self.depth = nn.Linear(32, CLASSES), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x).flatten(1)
        return {"kind": self.kind(y), "depth": self.depth(y)}


class FreeSize(nn.Module):
    """Its height and width may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutional()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
        return y


def part_compiled() -> nn.Module:
    """A compiled part between plain ones."""
    net = convolutional()
    net[3] = torch.compile(net[3], backend="eager")
    return net


def part_scripted() -> nn.Module:
    """A scripted part between plain ones."""
    net = convolutional()
    net[6] = torch.jit.script(net[6])
    return net
