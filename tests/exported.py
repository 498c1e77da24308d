"""Networks with exits and factorized layers for the export's tests."""

from __future__ import annotations

import torch
from tiny import CLASSES, tiny_residual, tiny_transformer
from torch import nn

from edgewright.models.layers.factorized import FactorizedConv2d, FactorizedLinear, SharedBasis
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

NETWORKS = {
    "residual": (tiny_residual, ("stem", "blocks.1"), 8, 4),
    "transformer": (tiny_transformer, ("layers.0", "layers.1"), 16, 3),
}
THRESHOLDS = {
    "class_exclusion": 0.9,
    "max_probability": 0.34,
    "class_exclusion_permanent": 0.9,
    "class_exclusion_softmax": 0.95,
    "entropy": 0.95,
}

CASES = [
    *((network, policy) for network in NETWORKS for policy in ("class_exclusion", "max_probability")),
    ("residual", "class_exclusion_permanent"),
    ("residual", "class_exclusion_softmax"),
    ("transformer", "entropy"),
]
"""Every policy, and both networks."""


def with_exits(network: str, policy: str = "class_exclusion") -> MultiExit:
    build, at, features, dims = NETWORKS[network]
    torch.manual_seed(1)
    model = MultiExit(build(), [HeadSpec(a, features) for a in at], [dims] * len(at), CLASSES, policy)
    model.thresholds.fill_(THRESHOLDS[policy])
    return model.eval()


def share_conv_bases(model: nn.Module, rank: int = 6) -> nn.Module:
    """Replaces the first convolution of every block of a tiny residual network by one shared basis."""
    torch.manual_seed(2)
    base = model.base if isinstance(model, MultiExit) else model
    basis = SharedBasis(0.1 * torch.randn(rank, 8, 3, 3))
    for block in base.blocks:
        old = block.conv1
        block.conv1 = FactorizedConv2d(basis, torch.randn(16, rank, 1, 1), None, old.stride, old.padding, old.dilation)
    return model.eval()


def share_linear_bases(model: nn.Module, rank: int = 5) -> nn.Module:
    """q, k, v of every layer of a tiny transformer share one basis over all layers."""
    torch.manual_seed(2)
    base = model.base if isinstance(model, MultiExit) else model
    basis = SharedBasis(0.2 * torch.randn(16, rank))
    for layer in base.layers:
        for name in ("q", "k", "v"):
            old = getattr(layer.attention, name)
            setattr(layer.attention, name, FactorizedLinear(basis, torch.randn(rank, 16), old.bias.detach().clone()))
    return model.eval()
