"""Layers whose weight is a product of a basis, possibly shared with other layers, and private coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedBasis(nn.Module):
    """Holds one basis; the same module object is a child of every layer that uses it.

    `weight` is [in_features, rank] for linear layers, so that ``x @ weight`` needs no transpose and an exporter
    has nothing to alias or fold, and [rank, in_channels, *kernel] for convolutions.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return self.weight.shape[1] if self.weight.dim() == 2 else self.weight.shape[0]


class FactorizedLinear(nn.Module):
    """``y = (x @ B) @ C + bias``: B [in, rank] in `basis`, C [rank, out] private (METHODS §3.1, arXiv 2410.03765)."""

    def __init__(self, basis: SharedBasis, coefficients: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.basis = basis
        self.coefficients = nn.Parameter(coefficients)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.basis.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.coefficients.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """Multiplies with the basis: ``[..., in] -> [..., rank]``."""
        return x @ self.basis.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        y = self.project(x) @ self.coefficients
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """The product as an `nn.Linear` weight [out, in]."""
        return (self.basis.weight @ self.coefficients).T

    def extra_repr(self) -> str:
        """Widths for `print(model)`."""
        return f"in_features={self.in_features}, rank={self.basis.rank}, out_features={self.out_features}"


class _FactorizedConv(nn.Module):
    """A convolution onto `rank` shared filters, then a private one of kernel 1.

    The weight [O, I, *kernel] seen as a matrix [I * positions, O] is ``B C``: B is the shared filter bank
    [rank, I, *kernel], C the coefficients [O, rank, 1, ...]. Layers that share B may differ in stride, padding and
    dilation.
    """

    def __init__(
        self,
        basis: SharedBasis,
        coefficients: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.basis = basis
        self.coefficients = nn.Parameter(coefficients)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @property
    def in_channels(self) -> int:
        """Width of the input."""
        return self.basis.weight.shape[1]

    @property
    def out_channels(self) -> int:
        """Width of the output."""
        return self.coefficients.shape[0]

    def dense_weight(self) -> Tensor:
        """The product as the weight [O, I, *kernel] of an ordinary convolution."""
        return torch.einsum("or,r...->o...", self.coefficients.flatten(1), self.basis.weight)

    def extra_repr(self) -> str:
        """Widths for `print(model)`."""
        rank, channels, *kernel = self.basis.weight.shape
        return (
            f"{channels}, {self.out_channels}, kernel_size={tuple(kernel)}, rank={rank}, "
            f"stride={self.stride}, padding={self.padding}"
        )


class FactorizedConv1d(_FactorizedConv):
    """See `_FactorizedConv`."""

    def project(self, x: Tensor) -> Tensor:
        """Convolves with the basis: ``[N, I, T] -> [N, rank, T']``."""
        return nn.functional.conv1d(x, self.basis.weight, None, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, I, T] -> [N, O, T']``."""
        return nn.functional.conv1d(self.project(x), self.coefficients, self.bias)


class FactorizedConv2d(_FactorizedConv):
    """See `_FactorizedConv`."""

    def project(self, x: Tensor) -> Tensor:
        """Convolves with the basis: ``[N, I, H, W] -> [N, rank, H', W']``."""
        return nn.functional.conv2d(x, self.basis.weight, None, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, I, H, W] -> [N, O, H', W']``."""
        return nn.functional.conv2d(self.project(x), self.coefficients, self.bias)
