"""Plain convolutional networks for small images: the VGG variants of the pruning and early-exit papers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import Tensor, nn

from .residual import init_convolutions

Layout: TypeAlias = Sequence[int | Literal["M"]]
"""Output widths of 3x3 convolutions, and "M" for 2x2 max pooling."""

_VGG16: Layout = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_VGG19: Layout = (
    64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512
)  # fmt: skip
_VGGSMALL: Layout = (128, 128, "M", 256, 256, "M", 512, 512, "M")


class VGG(nn.Module):
    """Convolutions with batch norm and ReLU, pooling, then linear layers.

    Args:
        layout: see `Layout`.
        hidden: widths of the linear layers before the last, each with batch norm and ReLU.
        classes: number of logits.
        in_channels: of the image.
        conv_bias: of the convolutions.
        pooled: side of the feature map that the linear layers see, after average pooling.
    """

    def __init__(
        self,
        layout: Layout,
        hidden: Sequence[int],
        classes: int,
        in_channels: int,
        conv_bias: bool,
        pooled: int,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, convolutions, pools = in_channels, 0, 0
        for width in layout:
            if width == "M":
                layers[f"pool{pools}"] = nn.MaxPool2d(2)
                pools += 1
                continue
            layers[f"conv{convolutions}"] = nn.Conv2d(channels, width, 3, 1, 1, bias=conv_bias)
            layers[f"norm{convolutions}"] = nn.BatchNorm2d(width)
            layers[f"relu{convolutions}"] = nn.ReLU()
            channels, convolutions = width, convolutions + 1
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        layers, features = OrderedDict(), channels * pooled**2
        for index, width in enumerate(hidden):
            layers[f"linear{index}"] = nn.Linear(features, width)
            layers[f"norm{index}"] = nn.BatchNorm1d(width)
            layers[f"relu{index}"] = nn.ReLU()
            features = width
        layers[f"linear{len(hidden)}"] = nn.Linear(features, classes)
        self.classifier = nn.Sequential(layers)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W] -> [N, classes]``."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg16(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGG-16 for 32x32 images, classifier 512-512-C: 313,463,808 MACs, 14,991,946 parameters at 10 classes.

    Args:
        classes: number of logits.
        in_channels: of the image [N, in_channels, H, W], at least 16x16.
    """
    return VGG(_VGG16, (512,), classes, in_channels, conv_bias=True, pooled=1)


def vgg19(classes: int = 100, in_channels: int = 3) -> nn.Module:
    """VGG-19 for 32x32 images with one linear layer: 398,182,400 MACs, 20,086,692 parameters at 100 classes.

    Args:
        classes: number of logits.
        in_channels: of the image [N, in_channels, H, W], at least 16x16.
    """
    return VGG(_VGG19, (), classes, in_channels, conv_bias=True, pooled=1)


def vggsmall(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """VGGsmall for 32x32 images: 616,966,144 MACs, 14,031,754 parameters at 10 classes (METHODS §0.2).

    Args:
        classes: number of logits.
        in_channels: of the image [N, in_channels, 32, 32].
    """
    return VGG(_VGGSMALL, (1024, 1024), classes, in_channels, conv_bias=False, pooled=4)
