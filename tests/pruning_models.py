"""Small models with what strangers' models have: gates, concatenations, groups, shuffles, plain parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision.models as tv
from tiny import CLASSES, tiny_residual, tiny_transformer
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.inception import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE


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


def _vgg() -> nn.Module:
    model = tv.VGG(tv.vgg.make_layers([8, "M", 12, 12, "M"], batch_norm=True), init_weights=False)
    # the original classifier alone would have a hundred million weights
    model.classifier = nn.Sequential(nn.Linear(12 * 49, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, CLASSES))
    return model


def _bottleneck() -> nn.Module:
    """ResNet-50's blocks, and, with another width, those of the wide ResNets."""
    return tv.ResNet(tv.resnet.Bottleneck, [2, 1, 1, 1], CLASSES, width_per_group=16)


def _basic() -> nn.Module:
    return tv.resnet.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def _resnext() -> nn.Module:
    return tv.resnet.ResNet(tv.resnet.Bottleneck, [1, 2, 1, 1], CLASSES, groups=4, width_per_group=8)


def _mobilenet_v2() -> nn.Module:
    blocks = [[1, 8, 1, 1], [6, 12, 2, 2], [6, 16, 2, 1]]
    return tv.MobileNetV2(CLASSES, 0.5, inverted_residual_setting=blocks)


def _mobilenet_v3() -> nn.Module:
    config = tv.mobilenetv3.InvertedResidualConfig
    rows = [(8, 3, 8, 8, True, "RE", 1), (8, 3, 32, 12, False, "RE", 2), (12, 5, 48, 12, True, "HS", 1)]
    return tv.MobileNetV3([config(*row, dilation=1, width_mult=1) for row in rows], 48, CLASSES)


def _efficientnet() -> nn.Module:
    config = tv.efficientnet.MBConvConfig
    blocks = [config(1, 3, 1, 16, 12, 1, 1, 1), config(4, 3, 2, 12, 20, 2, 1, 1), config(4, 5, 2, 20, 24, 1, 1, 1)]
    return tv.EfficientNet(blocks, 0.1, num_classes=CLASSES, last_channel=48)


def _regnet() -> nn.Module:
    params = tv.regnet.BlockParams.from_init_params(4, 16, 16.0, 2.0, 8, se_ratio=0.25)
    return tv.RegNet(params, CLASSES, stem_width=8)


def _convnext() -> nn.Module:
    config = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([config(16, 24, 2), config(24, None, 1)], 0.0, 0.1, num_classes=CLASSES)


def _inception() -> nn.Module:
    """The blocks of GoogLeNet and of Inception v3, one of each kind."""
    parts = [BasicConv2d(3, 12, kernel_size=3, stride=2), Inception(12, 4, 4, 8, 2, 4, 4)]
    parts += [InceptionA(20, 6), InceptionB(230), InceptionC(710, 16), InceptionD(768), InceptionE(1280)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, CLASSES))


def _vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 2, 4, 32, 128, num_classes=CLASSES)


def _swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vgg": _vgg,
    "resnet": _basic,
    "resnet_bottleneck": _bottleneck,
    "resnext": _resnext,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v3": _mobilenet_v3,
    "efficientnet": _efficientnet,
    "mnasnet": lambda: tv.MNASNet(0.25, CLASSES),
    "densenet": lambda: tv.DenseNet(8, (2, 2), 16, 2, num_classes=CLASSES),
    "regnet": _regnet,
    "convnext": _convnext,
    "squeezenet": lambda: tv.SqueezeNet("1_1", CLASSES),
    "inception": _inception,
    "shufflenet": lambda: tv.ShuffleNetV2([1, 2, 1], [8, 16, 32, 48, 64], CLASSES),
    "vit": _vit,
    "swin": _swin,
}
"""Small networks made of torchvision's own blocks, one of every family; all take [N, 3, 32, 32]."""


def lively(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose normalisations are not the identity and whose heads and scales are not next to nothing."""
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, 1.0)
    for value in model.parameters():
        if value.abs().max() < 1e-3:
            nn.init.uniform_(value, -0.5, 0.5)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": tiny_residual,
    "transformer": tiny_transformer,
    "patchwork": lambda: lively(Patchwork),
    "gated": lambda: lively(GatedUnits),
    "written_width": lambda: lively(WrittenWidth),
}
"""All take [N, 1, 12, 12]."""
