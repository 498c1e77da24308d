"""How much the loss cares about what a layer gives: second moments of its gradient, streamed over calibration batches.

METHODS §3.5, item 6, and the weight Fisher of FWSVD (§3.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from edgewright.export.source import answers_of

from ..errors import StageError
from ..metric import IGNORED
from ..task import Batch, Task, named_outputs
from .layers import Layer

Labels: TypeAlias = Literal["data", "sampled"]


@dataclass(frozen=True)
class Gradients:
    """What outputs or weights mean to the loss, as means over samples; on the CPU, float32.

    g is the gradient of a sample's loss at a row of a layer's output y = x W, and sums run over the rows of a sample.

    Attributes:
        outputs: ``F = Σ g gᵀ`` [d_out, d_out] by path, of convolutions and of layers narrower than their input.
        pulled_back: ``D = W F Wᵀ`` [d_in, d_in] by path, of the others: it says as much, and is smaller.
        weights: per input column the squared gradient of the weights, summed over the outputs [d_in], by path.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    pulled_back: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def is_pulled_back(layer: Layer) -> bool:
    """Whether a layer's gradients are kept as D [d_in, d_in] and not as F [d_out, d_out]."""
    return layer.kind == "linear" and layer.fan_in <= layer.output_width


class _Moment:
    """Sums up ``rowsᵀ rows``."""

    def __init__(self, path: str, width: int) -> None:
        self.path = path
        self.total = torch.zeros(width, width)

    def add(self, rows: Tensor) -> None:
        """Takes in rows [n, width]."""
        part = rows.T @ rows
        _check(part, self.path)
        self.total += part.to(self.total)


class _Output:
    """Takes in the gradients at one layer's output."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.moment = _Moment(layer.path, layer.output_width)

    def watch(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook: the output becomes part of a graph although no parameter before it is trained."""
        del module, inputs
        # a copy, because what comes after may write into it
        watched = output if output.requires_grad else output.detach().requires_grad_().clone()
        watched.register_hook(self._take)  # type: ignore[no-untyped-call]
        return watched

    def _take(self, gradient: Tensor) -> None:
        rows = gradient.detach().to(torch.float32)
        if self.layer.kind != "linear":
            rows = rows.movedim(1, -1)
        self.moment.add(rows.reshape(-1, self.layer.output_width))


class _Input:
    """Takes in the gradients at what one linear layer reads, as far as they come from this layer."""

    def __init__(self, layer: Layer) -> None:
        self.moment = _Moment(layer.path, layer.fan_in)

    def watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook that gives the layer a copy of the input for itself, at which its gradient arrives."""
        del module
        x = args[0] if args else kwargs["input"]
        own = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        own.register_hook(self._take)
        return ((own, *args[1:]), kwargs) if args else ((), {**kwargs, "input": own})

    def _take(self, gradient: Tensor) -> None:
        self.moment.add(gradient.detach().to(torch.float32).flatten(0, -2))


def collect_gradients(
    model: nn.Module,
    task: Task,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    of_weights: bool = False,
    labels: Labels = "data",
    generator: Callable[..., torch.Generator],
) -> Gradients:
    """Runs `model` forward and backward over `batches`.

    Args:
        model: in eval mode, on `device`; parameters come back without gradients, their `requires_grad` as before.
        task: gives the loss.
        layers: whose gradients are wanted.
        batches: calibration samples.
        device: where to compute.
        of_weights: the squared gradient of the weights in place of the outputs' moments.
        labels: gradients of the loss on the data's targets, or on targets that are drawn from the model's own
            prediction: then F is the Fisher information and not its empirical estimate.
        generator: as `Context.generator`; draws the targets.

    Raises:
        StageError: a gradient is not finite; names the layer.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights = {x.path: model.get_submodule(x.path).get_parameter("weight") for x in layers if of_weights}
    fisher = {x.path: torch.zeros(x.fan_in) for x in layers if of_weights}
    outputs = {x.path: _Output(x) for x in layers if not is_pulled_back(x) and not of_weights}
    inputs = {x.path: _Input(x) for x in layers if is_pulled_back(x) and not of_weights}
    samples = 0
    with ExitStack() as hooks:
        hooks.callback(_restore, wanted)
        for parameter in wanted:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_()
        for path, output in outputs.items():
            hooks.callback(model.get_submodule(path).register_forward_hook(output.watch).remove)
        for path, read in inputs.items():
            hooks.callback(model.get_submodule(path).register_forward_pre_hook(read.watch, with_kwargs=True).remove)
        for number, batch in enumerate(batches):
            _backward(model, task, batch.to(device), labels, lambda number=number: generator("labels", number))  # type: ignore[misc]
            samples += len(batch.targets)
            for path, weight in weights.items():
                if weight.grad is not None:
                    squared = weight.grad.flatten(1).to(torch.float32).square().sum(dim=0)
                    _check(squared, path)
                    fisher[path] += squared.to(fisher[path])
                    weight.grad = None
    return Gradients(
        {path: output.moment.total / samples for path, output in outputs.items()},
        {path: read.moment.total / samples for path, read in inputs.items()},
        {path: total / samples for path, total in fisher.items()},
    )


def _backward(
    model: nn.Module, task: Task, batch: Batch, labels: Labels, generator: Callable[[], torch.Generator]
) -> None:
    with torch.enable_grad():
        logits = named_outputs(model(*batch.inputs), answers_of(task))
        targets = batch.targets
        if labels == "sampled":
            targets = drawn_targets(logits, targets, generator())
        # the sum of the samples' losses: what a batch holds does not change a sample's gradient
        (task.loss(logits, targets) * len(targets)).backward()  # type: ignore[no-untyped-call]


def _restore(wanted: Mapping[nn.Parameter, bool]) -> None:
    for parameter, trained in wanted.items():
        parameter.requires_grad_(trained)
        parameter.grad = None


def _check(part: Tensor, path: str) -> None:
    if not bool(torch.isfinite(part).all()):
        raise StageError(
            f"the gradient of the loss at layer {path!r} is not finite on the calibration data: train the model with a "
            "lower learning rate, or choose whitening: input, which needs no gradient"
        )


def drawn_targets(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Targets drawn from the softmax of `logits` [..., C] or [N, C, ...], where `targets` [...] has some to predict."""
    if targets.shape != logits.shape[:-1] and targets.shape == (*logits.shape[:1], *logits.shape[2:]):
        logits = logits.movedim(1, -1)  # of a class for each pixel
    # by the Gumbel trick, a row at a time: a sample of 49k words needs no second copy of all logits
    drawn = torch.empty_like(targets)
    flat, out = logits.detach().flatten(0, -2), drawn.view(-1)
    for start in range(0, len(flat), 256):
        part = flat[start : start + 256].to("cpu", torch.float32)
        noise = torch.rand(part.shape, generator=generator).clamp_(min=1e-20)
        out[start : start + 256] = (part - (-noise.log_()).log_()).argmax(dim=-1).to(out.device)
    return torch.where(targets == IGNORED, targets, drawn)
