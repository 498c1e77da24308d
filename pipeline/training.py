"""One training loop for every stage that trains: seeded, resumable after each epoch, the same bits either way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from .errors import StageError
from .stage import Context, Json, StageConfig, State
from .task import Batch, Task, batches, split_of

BatchLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of a training batch, scalar."""


class TrainingConfig(StageConfig):
    """How to train; used by the `train` stage and by every stage that retrains."""

    epochs: int = Field(default=10, ge=0)
    """Passes over the train split."""
    batch_size: int = Field(default=128, ge=1)
    """Rows per step."""
    learning_rate: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    """Peak learning rate."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0.0)
    """Decoupled for AdamW, L2 for SGD."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Cosine to zero, times `step_factor` at every milestone, or constant."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """For `step`: shares of the run."""
    step_factor: float = 0.1
    """For `step`."""
    warmup: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the run with a linearly rising rate."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target's mass spread over all classes."""
    gradient_clip: float | None = Field(default=None, gt=0.0)
    """Largest gradient norm."""


def learning_rate_factor(config: TrainingConfig, done: float) -> float:
    """Multiplier of the peak learning rate after a share `done` in [0, 1) of the run."""
    if done < config.warmup:
        return (done + 1e-3) / config.warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return float(config.step_factor ** sum(done >= m for m in config.milestones))
    return 0.5 * (1.0 + math.cos(math.pi * (done - config.warmup) / max(1e-9, 1.0 - config.warmup)))


def task_loss(task: Task, config: TrainingConfig) -> BatchLoss:
    """The task's own loss on the model's logits, with label smoothing where the recipe asks for it."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(*batch.inputs)
        if config.label_smoothing > 0.0:
            return nn.functional.cross_entropy(logits, batch.targets, label_smoothing=config.label_smoothing)
        return task.loss(logits, batch.targets)

    return loss


def train_model(
    model: nn.Module,
    task: Task,
    config: TrainingConfig,
    context: Context,
    name: str,
    loss: BatchLoss | None = None,
    parameters: list[nn.Parameter] | None = None,
) -> list[dict[str, Json]]:
    """Trains `model` in place on the train split and returns one row per epoch (epoch, loss, learning_rate).

    Progress is saved under `name` after every epoch; called again after an interruption it goes on there, and ends
    with the same bits as an uninterrupted run.

    Args:
        model: trained in place on the context's device; returned to the CPU, in eval mode.
        task: gives the train split and the augmentation.
        config: see `TrainingConfig`.
        context: seeds, device, progress, saved state.
        name: distinguishes several trainings of one stage.
        loss: default `task_loss`.
        parameters: what to train, default everything.

    Raises:
        StageError: the loss is not finite.
    """
    loss = task_loss(task, config) if loss is None else loss
    split = split_of(task, "train", needed_by=f"training ({name})")
    device = context.device
    model.to(device)
    trained = list(model.parameters()) if parameters is None else parameters
    optimizer = _optimizer(trained, config)
    log: list[dict[str, Json]] = []
    state = context.load(name)
    if state is not None:
        log = list(state.data["log"])
        _restore(model, optimizer, state)
    # as `batches(drop_last=True)`: a last batch of one row would break batch normalisation
    steps = max(1, len(split) // config.batch_size)
    for epoch in context.progress.track(range(len(log), config.epochs), f"{name}: epochs"):
        # users' modules and augmentations may draw from the global generators
        seed = int(torch.randint(2**62, (), generator=context.generator(name, "torch", epoch)))
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        model.train()
        total, seen = 0.0, 0
        shuffle, noise = context.generator(name, "shuffle", epoch), context.generator(name, "augment", epoch)
        for step, batch in enumerate(batches(split, config.batch_size, shuffle, drop_last=True)):
            rate = config.learning_rate * learning_rate_factor(config, (epoch + step / steps) / config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = loss(model, task.augment(batch, noise).to(device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if config.gradient_clip is not None:
                nn.utils.clip_grad_norm_(trained, config.gradient_clip)
            optimizer.step()
            total, seen = total + value.item() * len(batch.targets), seen + len(batch.targets)
        mean = total / max(1, seen)
        if not math.isfinite(mean):
            raise StageError(
                f"{name}: the training loss is {mean} in epoch {epoch + 1}: lower learning_rate "
                f"(now {config.learning_rate}) or set gradient_clip"
            )
        log.append({"epoch": epoch + 1, "loss": mean, "learning_rate": rate})
        context.save(name, _state(model, optimizer, log))
    model.to("cpu").eval()
    return log


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, log: list[dict[str, Json]]) -> State:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = value
    return State({"log": log, "optimizer": scalars}, tensors)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    entries: dict[int, dict[str, Any]] = {}
    for key, value in state.tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".", 2)
            entries.setdefault(int(index), {})[field] = value
    for key, value in state.data["optimizer"].items():
        index, field = key.split(".", 1)
        entries.setdefault(int(index), {})[field] = value
    whole = optimizer.state_dict()
    whole["state"] = entries
    optimizer.load_state_dict(whole)
