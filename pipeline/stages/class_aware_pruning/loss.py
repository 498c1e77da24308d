"""The training loss of class-aware pruning: cross entropy, L1 on everything, orthogonal 3x3 filters (METHODS §1.1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...task import Batch, Task
from ...training.training import BatchLoss, TrainingConfig, task_loss


def orthogonality(kernel: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
    """``|| conv2d(K, K) - T ||_F``, not squared: how far the filters of one layer are from orthogonal.

    The O filters stand in for a batch of O images; T is the identity at the centre tap. Where O > I * k * k the
    value cannot reach 0.

    Args:
        kernel: [O, I, k, k].
        padding: 1 as in the paper's release; k - 1 covers every overlap of two filters.
        stride: of the convolution of the filters with each other.

    Returns:
        A scalar; its gradient at 0 is 0.
    """
    products = nn.functional.conv2d(kernel, kernel, stride=stride, padding=padding)
    target = torch.zeros_like(products)
    centre_row, centre_column = products.shape[2] // 2, products.shape[3] // 2
    target[:, :, centre_row, centre_column] = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return cast("Tensor", torch.linalg.vector_norm(products - target))


def penalty(model: nn.Module, lambda1: float, lambda_o: float, padding: int = 1) -> Tensor:
    """``lambda1 * sum |theta| + lambda_o * sum R(K)`` over all parameters and all dense 3x3 convolutions.

    Grouped convolutions are left out: filters of different groups do not interact.

    Args:
        model: any.
        lambda1: weight of the L1 norm of all trained parameters, biases and normalisation included.
        lambda_o: weight of `orthogonality`.
        padding: of `orthogonality`.
    """
    first = next(model.parameters())
    total = torch.zeros((), device=first.device, dtype=first.dtype)
    if lambda1:
        total = total + lambda1 * torch.stack([p.abs().sum() for p in model.parameters() if p.requires_grad]).sum()
    if lambda_o:
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1:
                total = total + lambda_o * orthogonality(module.weight, padding)
    return total


def modified_loss(task: Task, training: TrainingConfig, lambda1: float, lambda_o: float, padding: int) -> BatchLoss:
    """The task's loss plus `penalty`, for `train_model`."""
    plain = task_loss(task, training)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return plain(model, batch) + penalty(model, lambda1, lambda_o, padding)

    return loss
