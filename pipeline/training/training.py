"""One training loop for every stage that trains: seeded, resumable after each epoch, the same bits either way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgewright.export.source import answers_of

from ..errors import StageError
from ..stage import Context, Json, StageConfig, State
from ..task import Batch, Task, batches, split_of
from .label_smoothing import smoothed_loss
from .model_output import training_logits
from .optimizer_state import optimizer_state, restore_optimizer

BatchLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of a training batch, scalar."""

# where a recipe leaves the batch size open; below 8 rows the statistics of batch normalisation are mostly noise
LARGEST_BATCH, _SMALLEST_BATCH, _STEPS_PER_EPOCH = 128, 8, 16
FEW_STEPS = 50
"""Fewer steps than this in all hardly move a network."""
_LARGE_INPUT = 30.0  # of normalised data hardly any value lies beyond 10


class TrainingConfig(StageConfig):
    """How to train; used by the `train` stage and by every stage that retrains."""

    epochs: int = Field(default=10, ge=0)
    """Passes over the train split."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per step. null: 128, on a small train split less, so that an epoch has 16 steps; never less than 8."""
    learning_rate: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    """Peak learning rate; if it is left out, AdamW takes 0.001."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's momentum; false is the plain one, which the published methods were trained with."""
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
    """Share of the target's mass spread over all classes, in whatever cross entropy the task's own loss computes; a
    loss without one is refused."""
    gradient_clip: float | None = Field(default=5.0, gt=0.0)
    """Largest norm of the gradient; null does not limit it."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adamw(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("optimizer") == "adamw":
            return {"learning_rate": 0.001, **value}
        return value

    def rows_per_step(self, rows: int) -> int:
        """The batch size for a train split of `rows` samples."""
        if self.batch_size is not None:
            return self.batch_size
        return min(LARGEST_BATCH, max(_SMALLEST_BATCH, rows // _STEPS_PER_EPOCH))


def trainings_in(config: StageConfig) -> dict[str, TrainingConfig]:
    """Every training in a stage's configuration by the name of its section, "" for the configuration itself."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    found = {name: value for name, value in fields.items() if isinstance(value, TrainingConfig)}
    return {"": config, **found} if isinstance(config, TrainingConfig) else found


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

    specs = answers_of(task)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = training_logits(model, model(*batch.inputs), specs)
        return smoothed_loss(task, logits, batch.targets, config.label_smoothing)

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
        StageError: the loss, the gradient or a trained value is not finite; names the epoch and what helps.
        ModelError: the model returns more than logits while it is trained.
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
    rows = config.rows_per_step(len(split))
    # as `batches(drop_last=True)`: a last batch of one row would break batch normalisation
    steps = max(1, len(split) // rows)
    for epoch in context.progress.track(range(len(log), config.epochs), f"{name}: epochs"):
        # users' modules and augmentations may draw from the global generators
        seed = int(torch.randint(2**62, (), generator=context.generator(name, "torch", epoch)))
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        model.train()
        total, seen = 0.0, 0
        shuffle, noise = context.generator(name, "shuffle", epoch), context.generator(name, "augment", epoch)
        for step, batch in enumerate(batches(split, rows, shuffle, drop_last=True)):
            rate = config.learning_rate * learning_rate_factor(config, (epoch + step / steps) / config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = task.augment(batch, noise).to(device)
            value = loss(model, batch)
            current = value.item()
            if not math.isfinite(current):
                raise _diverged(f"the loss is {current}", name, epoch, step, config, batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            limit = math.inf if config.gradient_clip is None else config.gradient_clip
            norm = nn.utils.clip_grad_norm_(trained, limit)
            if not torch.isfinite(norm):
                raise _diverged(f"the norm of the gradient is {norm.item()}", name, epoch, step, config, batch)
            optimizer.step()
            total, seen = total + current * len(batch.targets), seen + len(batch.targets)
        broken = _not_finite(model)
        if broken is not None:
            raise _diverged(f"{broken!r} is no longer finite", name, epoch, step, config, batch)
        log.append({"epoch": epoch + 1, "loss": total / seen, "learning_rate": rate, "batch_size": rows})
        context.save(name, _state(model, optimizer, log))
    model.to("cpu").eval()
    return log


def _not_finite(model: nn.Module) -> str | None:
    """The first parameter or buffer that holds NaN; infinite buffers are somebody's attention mask."""
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return key
    return next((key for key, buffer in model.named_buffers() if torch.isnan(buffer).any()), None)


def _diverged(what: str, name: str, epoch: int, step: int, config: TrainingConfig, batch: Batch) -> StageError:
    remedies = [f"lower learning_rate (now {config.learning_rate:g}, try {config.learning_rate / 10:g})"]
    if config.gradient_clip is None:
        remedies.append("set gradient_clip, e.g. 5.0 (now off)")
    elif config.gradient_clip > 1.0:
        remedies.append(f"lower gradient_clip (now {config.gradient_clip:g})")
    if config.warmup == 0.0:
        remedies.append("set warmup, e.g. 0.1")
    largest = max((float(x.abs().max()) for x in batch.inputs if x.is_floating_point() and x.numel()), default=0.0)
    if largest > _LARGE_INPUT:
        remedies.insert(0, f"scale the inputs to about -1 ... 1 (they reach {largest:.3g})")
    return StageError(
        f"{name}: training diverged, {what} in epoch {epoch + 1} of {config.epochs}, step {step + 1}: "
        + ", or ".join(remedies)
    )


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, log: list[dict[str, Json]]) -> State:
    scalars, tensors = optimizer_state(optimizer)
    tensors |= {f"model.{key}": value for key, value in model.state_dict().items()}
    return State({"log": log, "optimizer": scalars}, tensors)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    restore_optimizer(optimizer, state.data["optimizer"], state.tensors)
