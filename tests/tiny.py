"""Tiny fixed-seed models and tasks for every test; seconds each, nothing downloaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgewright.models.layers.log_mel import LogMel
from edgewright.pipeline.task import SplitName
from edgewright.pipeline.tasks.detection import Detection
from edgewright.pipeline.tasks.embedding import Embedding
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.multilabel import MultiLabel
from edgewright.pipeline.tasks.restoration import Restoration
from edgewright.pipeline.tasks.segmentation import Segmentation
from edgewright.pipeline.tasks.shipped.synthetic_audio import synthetic_audio
from edgewright.pipeline.tasks.shipped.synthetic_detection import synthetic_detection
from edgewright.pipeline.tasks.shipped.synthetic_embedding import synthetic_embedding
from edgewright.pipeline.tasks.shipped.synthetic_multilabel import synthetic_multilabel
from edgewright.pipeline.tasks.shipped.synthetic_restoration import synthetic_restoration
from edgewright.pipeline.tasks.shipped.synthetic_segmentation import synthetic_segmentation
from edgewright.pipeline.tasks.shipped.synthetic_text import synthetic_text

CLASSES = 4
_PAGES: Mapping[SplitName, int] = {"train": 96, "calibration": 24, "validation": 24, "test": 24}


class Block(nn.Module):
    """A residual block whose inner width may be pruned and whose first convolution reads the stream."""

    def __init__(self, width: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.pool(x) + y)


class TinyResidual(nn.Module):
    """A residual CNN for [N, 1, 12, 12]."""

    def __init__(self, width: int = 8, inner: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, inner), Block(width, inner, 2), Block(width, inner))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v readers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (m(x).view(n, t, self.heads, d // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.o(y.transpose(1, 2).reshape(n, t, d))
        return out


class TinyLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class TinyTransformer(nn.Module):
    """Attention and MLP, no convolution: rows of the [N, 1, 12, 12] image are the tokens."""

    def __init__(self, width: int = 16, layers: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.layers = nn.ModuleList(TinyLayer(width, 2, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(self.norm(x).mean(dim=1))
        return logits


def tiny_residual(seed: int = 0) -> nn.Module:
    """A `TinyResidual` with lively batch-norm statistics, eval mode."""
    torch.manual_seed(seed)
    model = TinyResidual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def tiny_transformer(seed: int = 0) -> nn.Module:
    """A `TinyTransformer`, eval mode."""
    torch.manual_seed(seed)
    return TinyTransformer().eval()


def tiny_task(seed: int = 0, rows: Mapping[SplitName, int] | None = None) -> ImageClassification:
    """Four classes of noisy 12 x 12 images: a bright square in one of the corners, with distractors."""
    rows = rows or {"train": 256, "calibration": 64, "validation": 128, "test": 128}
    generator = torch.Generator().manual_seed(seed)
    splits = {}
    for name, count in rows.items():
        y = torch.arange(count) % CLASSES
        x = 0.35 * torch.randn(count, 1, 12, 12, generator=generator)
        for i in range(count):
            top, left = 6 * int(y[i] // 2), 6 * int(y[i] % 2)
            shift = torch.randint(0, 3, (2,), generator=generator)
            x[i, 0, top + shift[0] : top + shift[0] + 3, left + shift[1] : left + shift[1] + 3] += 1.0
        splits[name] = (x, y)
    return ImageClassification(splits, [f"corner{i}" for i in range(CLASSES)], name="tiny")


class TinySignal(nn.Module):
    """One-dimensional convolutions that differ in stride, padding and bias; an image is read as one long signal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 12, 5, 2, 2)
        self.conv1 = nn.Conv1d(12, 12, 5, padding=2, bias=False)
        self.conv2 = nn.Conv1d(12, 12, 5, 2, padding="valid")
        self.conv3 = nn.Conv1d(12, 16, 5, padding="same")
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.flatten(2)))
        x = torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))))
        logits: Tensor = self.out(x.mean(dim=2))
        return logits


def tiny_signal() -> nn.Module:
    torch.manual_seed(0)
    return TinySignal().eval()


class TinySiamese(nn.Module):
    """The upper and the lower half of an image through one encoder, which stands at two paths; one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.lower = self.upper
        self.mix = nn.Linear(24, 24)
        self.again = self.mix
        self.out = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = self.upper(x[:, 0, :6]), self.lower(x[:, 0, 6:])
        both = self.again(torch.relu(self.mix(torch.cat([upper, lower], dim=1))))
        logits: Tensor = self.out(torch.cat([both[:, :6].mean(dim=1), both[:, 6:].mean(dim=1)], dim=1))
        return logits


def tiny_siamese() -> nn.Module:
    torch.manual_seed(0)
    return TinySiamese().eval()


class TinyRecurrent(nn.Module):
    """The rows of an image are the steps of a bidirectional LSTM of two layers, and of a GRU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x[:, 0])
        logits: Tensor = self.out(self.gru(states)[0][:, -1])
        return logits


def tiny_recurrent() -> nn.Module:
    torch.manual_seed(0)
    return TinyRecurrent().eval()


def tiny_values() -> nn.Module:
    """Three numbers for each row [N, 8]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def tiny_vectors() -> nn.Module:
    """A vector [8] for each row [N, 16]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def tiny_things() -> Embedding:
    """Rows [16] of things that are seen from several sides, for `tiny_vectors`."""
    return synthetic_embedding(things=40, views=4)


def tiny_map() -> nn.Module:
    """Logits [N, 3, H, W] of images [N, 1, H, W]."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 3, 1)).eval()


def tiny_pages() -> Segmentation:
    """Pages [1, 16, 16] with two characters and background, for `tiny_map`."""
    return synthetic_segmentation(rows=_PAGES, size=16, characters="AX", most=2)


def tiny_denoiser() -> nn.Module:
    """Images [N, 1, 16, 16] to images of this size."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 1, 3, 1, 1)]
    return nn.Sequential(*layers).eval()


def tiny_noisy() -> Restoration:
    """Pages [1, 16, 16] with noise, for `tiny_denoiser`."""
    return synthetic_restoration(rows=_PAGES, size=16, characters="AX", most=2)


class TinyText(nn.Module):
    """Logits [N, 3] of token ids [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.near = nn.Embedding(64, 16), nn.Conv1d(16, 24, 3, padding=1)
        self.mix, self.out = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        found = torch.relu(self.near(self.table(input_ids).transpose(1, 2))).amax(dim=2)
        logits: Tensor = self.out(torch.relu(self.mix(found)))
        return logits


def tiny_text() -> nn.Module:
    torch.manual_seed(0)
    return TinyText().eval()


def tiny_sentences() -> ImageClassification:
    """Token ids [16] of three classes, for `tiny_text`."""
    return synthetic_text(rows=240)


class TinySound(nn.Module):
    """Logits [N, 6] of sound [N, 2000], over a log-mel spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrogram = LogMel(4000, size=128, step=64, bands=12)
        self.body = nn.Sequential(nn.Conv1d(12, 24, 3), nn.ReLU(), nn.Conv1d(24, 24, 3, 2), nn.ReLU())
        self.out = nn.Linear(24, 6)

    def forward(self, sound: Tensor) -> Tensor:
        logits: Tensor = self.out(self.body(self.spectrogram(sound)).amax(dim=2))
        return logits


def tiny_sound() -> nn.Module:
    torch.manual_seed(0)
    return TinySound().eval()


def tiny_sounds() -> ImageClassification:
    """Sound [2000] of six classes, for `tiny_sound`."""
    return synthetic_audio(rows=240, rate=4000)


def tiny_labels() -> MultiLabel:
    """Pages [1, 16, 16] and which of four characters they show, for `tiny_residual`."""
    return synthetic_multilabel(rows=_PAGES, size=16, characters="ABKX", most=3)


class TinyDetector(nn.Module):
    """A raw head [N, 16, 4 + 2] of images [N, 1, 16, 16], a cell for every four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        raw: Tensor = self.head(self.body(x)).flatten(2).transpose(1, 2)
        return raw


def tiny_detector() -> nn.Module:
    """A `TinyDetector`, eval mode."""
    torch.manual_seed(0)
    return TinyDetector().eval()


def tiny_boxes() -> Detection:
    """Pages [1, 16, 16] with boxes around two characters, for `tiny_detector`."""
    return synthetic_detection(rows=_PAGES, size=16, characters="AX", most=2, strides=(4,))
