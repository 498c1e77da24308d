"""Training that brings back what a factorization lost: of the factors themselves, or of LoRA adapters on them.

METHODS §3.6, with the dense model as a teacher. `accelerate` places and distributes; the state is saved every few
steps, and what goes on after an interruption ends with the bits of an uninterrupted run.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgewright.export.source import answers_of
from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear, SharedBasis

from ...analysis.layers import replace_module
from ...errors import StageError
from ...stage import Context, Json, StageConfig, State
from ...task import Split, Task, named_outputs, split_of
from ...training.distillation import Answered, Distillation
from ...training.optimizer_state import optimizer_state, restore_optimizer


class RecoveryConfig(StageConfig):
    """How to train what a factorization made."""

    method: Literal["factors", "lora"] = "factors"
    """Train bases and coefficients, or low-rank adapters on the coefficients, which are merged back at the end."""
    steps: int = Field(default=100, ge=1)
    """Steps of the optimizer."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per step, over all processes; fewer pass at a time where their outputs are large."""
    learning_rate: float = Field(default=1e-4, gt=0.0, allow_inf_nan=False)
    """Peak rate of AdamW; it rises over the first twentieth of the steps and falls as a cosine."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled."""
    gradient_clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    distillation: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the loss that is the distance to the dense model's answer; the rest is the task's own. Over classes or
    tokens it is the divergence of the prediction (where several classes may be right of each one's own), for other
    outputs the mean squared error over their variance; of several outputs the mean."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products; weights and their sums stay float32. bf16 pays where the processor multiplies it."""
    save_every: int = Field(default=20, ge=1)
    """Steps between saved states; an interruption loses at most so many."""
    lora_rank: int = Field(default=8, ge=1)
    """With `lora`: rank of an adapter."""
    lora_alpha: float = Field(default=32.0, gt=0.0)
    """With `lora`: its scale times its rank."""


_Factorized = FactorizedLinear | FactorizedConv1d | FactorizedConv2d


def check_packages(config: RecoveryConfig) -> None:
    """Refuses a recovery whose libraries are not installed.

    Raises:
        StageError: names the package.
    """
    needed = {"accelerate": "recovery"} | ({"peft": "recovery with method lora"} if config.method == "lora" else {})
    for package, what in needed.items():
        if importlib.util.find_spec(package) is None:
            raise StageError(f"{what} needs the package {package}: pip install 'edgewright[hf]'")


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    config: RecoveryConfig,
    context: Context,
    name: str = "recovery",
    parameters: Sequence[nn.Parameter] | None = None,
) -> list[dict[str, Json]]:
    """Trains the factors of `model` in place on the train split; the rest of the model stays.

    Args:
        model: holds factorized layers; comes back on the CPU, in eval mode.
        teacher: the dense model; needed where `distillation` is above 0, not changed.
        task: gives the train split and the loss.
        config: see `RecoveryConfig`.
        context: seeds, device, progress, saved state.
        name: distinguishes several trainings of one stage.
        parameters: what to train in place of the factors; not with `lora`.

    Returns:
        One row per saved stretch: steps so far, mean loss since the last row, learning rate.

    Raises:
        StageError: a package is missing, there is nothing to train, or the loss is not finite.
    """
    if config.distillation > 0.0 and teacher is None:
        raise StageError(f"{name}: distillation {config.distillation:g} needs the dense model: give it, or set it to 0")
    check_packages(config)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapters = _Adapters(model, config, context, name) if config.method == "lora" else None
    trained = adapters.parameters() if adapters else list(parameters or _factors(model))
    if not trained:
        raise StageError(f"{name}: the model has no factorized layer to train: leave the recovery out, or lower ratio")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    try:
        log = _train(model, teacher, task, config, context, name, trained)
    finally:
        if adapters is not None:
            adapters.merge()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    model.to("cpu").eval()
    return log


def _factors(model: nn.Module) -> list[nn.Parameter]:
    """Bases, each once, and coefficients."""
    layers = [module for module in model.modules() if isinstance(module, _Factorized)]
    return list({id(p): p for layer in layers for p in (layer.basis.weight, layer.coefficients)}.values())


def _train(
    model: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    config: RecoveryConfig,
    context: Context,
    name: str,
    trained: list[nn.Parameter],
) -> list[dict[str, Json]]:
    accelerator = _accelerator(context)
    device = accelerator.device
    split = split_of(task, "train", needed_by=f"the recovery ({name})")
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    log, total = _restored(context.load(name), trained, optimizer)
    # no dropout, and statistics of normalisations stay: the teacher is matched as it answers
    ready, stepper = accelerator.prepare(model.to(device).eval(), optimizer)

    specs = answers_of(task)

    def answer(network: nn.Module, inputs: tuple[Tensor, ...]) -> Answered:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            found: Answered = named_outputs(network(*inputs), specs)
        return found.float() if isinstance(found, Tensor) else {name: one.float() for name, one in found.items()}

    distil: Distillation | None = None
    if teacher is not None and config.distillation > 0.0:
        distil = Distillation(teacher.to(device).eval(), task, split, answer, device)
    start = log[-1]["steps"] if log else 0
    for step in context.progress.track(range(start, config.steps), f"{name}: steps", config.steps - start):
        rate = config.learning_rate * _rate_factor(step, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = _rows(split, config.batch_size, step, name, context)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        for part in torch.split(mine, getattr(split, "largest_batch", config.batch_size)):
            batch = split.batch(part).to(device)
            logits = answer(ready, batch.inputs)
            loss = (1.0 - config.distillation) * task.loss(logits, batch.targets)
            if distil is not None:
                loss = loss + config.distillation * distil(logits, batch)
            accelerator.backward(loss * (len(part) / len(mine)))
            total += float(loss.detach()) * len(part) / len(mine)
        norm = accelerator.clip_grad_norm_(trained, config.gradient_clip)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            raise StageError(
                f"{name}: training diverged in step {step + 1} of {config.steps}: lower learning_rate (now "
                f"{config.learning_rate:g}, try {config.learning_rate / 10:g})"
            )
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        done = step + 1
        if done % config.save_every == 0 or done == config.steps:
            since = done - (log[-1]["steps"] if log else 0)
            log.append({"steps": done, "loss": total / since, "learning_rate": rate})
            context.progress.say(f"{name}: step {done} of {config.steps}, loss {total / since:.4f}")
            total = 0.0
            if accelerator.is_main_process:
                context.save(name, _state(log, trained, optimizer))
    return log


def _rate_factor(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _rows(split: Split, size: int, step: int, name: str, context: Context) -> Tensor:
    """Which samples step number `step` sees: the split in random orders, one after the other."""
    size = min(size, len(split))

    first, last = step * size // len(split), ((step + 1) * size - 1) // len(split)
    orders = [
        torch.randperm(len(split), generator=context.generator(name, "shuffle", epoch))
        for epoch in range(first, last + 1)
    ]
    whole = torch.cat(orders)
    start = step * size - first * len(split)
    return whole[start : start + size]


def _accelerator(context: Context) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=context.device.type == "cpu")


def _state(log: list[dict[str, Json]], trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    scalars, tensors = optimizer_state(optimizer)
    tensors |= {f"trained.{i}": parameter.detach() for i, parameter in enumerate(trained)}
    return State({"log": log, "optimizer": scalars}, tensors)


def _restored(
    state: State | None, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Json]], float]:
    """The log so far; puts parameters and optimizer where they were."""
    if state is None:
        return [], 0.0
    with torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.copy_(state.tensors[f"trained.{i}"])
    restore_optimizer(optimizer, state.data["optimizer"], state.tensors)
    return list(state.data["log"]), 0.0


class _Coefficients(nn.Module):
    """A factorized layer whose coefficients are an ordinary layer, which adapters can be put on."""

    def __init__(self, layer: _Factorized) -> None:
        super().__init__()
        self.basis: SharedBasis = layer.basis
        self.original = [layer]
        rank, bias = layer.basis.rank, layer.bias is not None
        self.coefficients: nn.Module
        if isinstance(layer, FactorizedLinear):
            self.coefficients = nn.Linear(rank, layer.out_features, bias, device="meta")
            weight = layer.coefficients.detach().T
        else:
            kind = nn.Conv1d if isinstance(layer, FactorizedConv1d) else nn.Conv2d
            self.coefficients = kind(rank, layer.out_channels, 1, bias=bias, device="meta")
            weight = layer.coefficients.detach()
        self.coefficients.weight = nn.Parameter(weight.contiguous())
        self.coefficients.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.coefficients(self.original[0].project(x))
        return found


class _Adapters:
    """LoRA adapters of `peft` on the coefficients of all factorized layers of a model."""

    def __init__(self, model: nn.Module, config: RecoveryConfig, context: Context, name: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.model = model
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, _Factorized)]
        self.paths = [path for path, _ in layers]
        for path, layer in layers:
            replace_module(model, path, _Coefficients(layer))
        if not layers:
            return
        # peft draws the first factor from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=context.generator(name, "adapters"))))
        targets = [f"{path}.coefficients" for path in self.paths]
        wanted = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        inject_adapter_in_model(wanted, model)

    def parameters(self) -> list[nn.Parameter]:
        """Of the adapters alone."""
        return [parameter for key, parameter in self.model.named_parameters() if ".lora_" in key]

    def merge(self) -> None:
        """Adds the adapters to the coefficients and puts the layers back."""
        for path in self.paths:
            holder = self.model.get_submodule(path)
            assert isinstance(holder, _Coefficients)
            adapter: Any = holder.coefficients
            adapter.merge()
            layer = holder.original[0]
            weight = adapter.get_base_layer().weight.detach()
            with torch.no_grad():
                layer.coefficients.copy_(weight.T if isinstance(layer, FactorizedLinear) else weight)
            replace_module(self.model, path, layer)
