"""Residual networks of bottleneck blocks for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .residual import init_convolutions, make_shortcut


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norm around a shortcut; the output is 4 * `width` wide."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = make_shortcut(channels, out_channels, stride, "projection")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, 4 * width, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class BottleneckResNet(nn.Module):
    """A 3x3 stem at full resolution and four stages of bottlenecks; see `resnet50_cifar`."""

    def __init__(self, blocks: Sequence[int], classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.stages = nn.Sequential()
        channels = 64
        for index, count in enumerate(blocks):
            stage, width = nn.Sequential(), 64 * 2**index
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                stage.add_module(f"block{number}", Bottleneck(channels, width, stride))
                channels = Bottleneck.expansion * width
            self.stages.add_module(f"stage{index}", stage)
        self.classifier = nn.Linear(channels, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W] -> [N, classes]``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


def resnet50_cifar(classes: int = 100, in_channels: int = 3) -> nn.Module:
    """ResNet-50 with a 3x3 stem for 32x32 images: 1,298,014,208 MACs, 23,705,252 parameters at 100 classes.

    Args:
        classes: number of logits.
        in_channels: of the image [N, in_channels, 32, 32].
    """
    return BottleneckResNet((3, 4, 6, 3), classes, in_channels)
