"""Residual networks of basic blocks for small images: one with wide inner convolutions, and ResNet-56."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al., arXiv 1512.03385).

    Args:
        channels: width of the input.
        inner: width between the two convolutions.
        out_channels: width of the output.
        stride: of the first convolution and the shortcut.
        shortcut: ``projection`` (1x1 convolution) or ``pad`` (subsample, zero channels: option A), where the
            shape changes.
    """

    def __init__(
        self, channels: int, inner: int, out_channels: int, stride: int = 1, shortcut: str = "projection"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = make_shortcut(channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, out_channels, H / stride, W / stride]``."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A: every stride-th pixel, missing channels filled with zeros on both sides."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - channels) // 2
        self.after = out_channels - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


def make_shortcut(channels: int, out_channels: int, stride: int, kind: str) -> nn.Module:
    """The shortcut of a block whose shape changes; see `BasicBlock`.

    Raises:
        ValueError: an unknown kind, or ``pad`` to fewer channels.
    """
    if kind == "projection":
        conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    if kind != "pad":
        raise ValueError(f"unknown shortcut {kind!r}; there are: pad, projection")
    if out_channels < channels:
        raise ValueError(f"a pad shortcut cannot lead from {channels} to only {out_channels} channels")
    return PadShortcut(channels, out_channels, stride)


class SmallResNet(nn.Module):
    """Stem, then stages of a strided transition and blocks of one stream width; see `resnet_small`."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        inner: Sequence[int],
        blocks: int,
        stem_stride: int,
        shortcut: str,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.Sequential()
        previous = widths[0]
        for index, (width, hidden) in enumerate(zip(widths, inner, strict=True)):
            stage = nn.Sequential()
            if index > 0:
                # the change of shape stands alone, so that every first convolution of the stage reads the
                # same width
                stage.add_module("transition", make_shortcut(previous, width, 2, shortcut))
            for number in range(blocks):
                stage.add_module(f"block{number}", BasicBlock(width, hidden, width))
            self.stages.add_module(f"stage{index}", stage)
            previous = width
        self.classifier = nn.Linear(widths[-1], classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W] -> [N, classes]``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


def resnet_small(
    in_channels: int = 1,
    classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 3,
    inner: Sequence[int] | None = None,
    width_factor: float = 1.0,
    stem_stride: int = 2,
    shortcut: Literal["projection", "pad"] = "projection",
) -> nn.Module:
    """A small residual CNN whose stream widths stay while inner channels are pruned.

    All blocks of a stage read one stream width, so their first convolutions can share a basis.

    Args:
        in_channels: of the image [N, in_channels, H, W].
        classes: number of logits.
        widths: stream width of every stage; each stage after the first halves the resolution.
        blocks: per stage.
        inner: width between the two convolutions of a block, per stage; default twice the stream width.
        width_factor: multiplies all widths: the uniformly reduced control network.
        stem_stride: of the first convolution.
        shortcut: how the stream changes its width, ``projection`` or ``pad``.

    Raises:
        ValueError: lengths differ, or a width below 1.
    """
    hidden = tuple(2 * width for width in widths) if inner is None else tuple(inner)
    if len(hidden) != len(widths) or not widths:
        raise ValueError(f"inner {list(hidden)} needs one entry per stage, as widths {list(widths)}")
    if min(*widths, *hidden, blocks, in_channels, classes) < 1 or width_factor <= 0:
        raise ValueError("widths, inner, blocks, in_channels and classes are at least 1, width_factor is above 0")
    scaled = [[max(1, round(width_factor * width)) for width in row] for row in (widths, hidden)]
    return SmallResNet(in_channels, classes, scaled[0], scaled[1], blocks, stem_stride, shortcut)


class CifarResNet(nn.Module):
    """The CIFAR residual network of depth 6n + 2; see `resnet56`."""

    def __init__(self, blocks: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential()
        previous = 16
        for index, width in enumerate((16, 32, 64)):
            stage = nn.Sequential()
            for number in range(blocks):
                stride = 2 if index > 0 and number == 0 else 1
                stage.add_module(f"block{number}", BasicBlock(previous, width, width, stride, "pad"))
                previous = width
            self.stages.add_module(f"stage{index}", stage)
        self.classifier = nn.Linear(64, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W] -> [N, classes]``."""
        logits: Tensor = self.classifier(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


def resnet56(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for 32x32 images, option-A shortcuts: 125,485,696 MACs, 853,018 parameters at 10 classes.

    Args:
        classes: number of logits.
        in_channels: of the image [N, in_channels, 32, 32].
    """
    return CifarResNet(9, classes, in_channels)


def init_convolutions(model: nn.Module) -> None:
    """He initialisation of every convolution of `model` (fan out); biases become zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
