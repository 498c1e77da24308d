"""How much the loss cares about what a layer gives: second moments of its gradient, streamed over calibration batches.

METHODS §3.5, item 6, and the weight Fisher of FWSVD (§3.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..graph import Layer
from ..metric import IGNORED
from ..task import Batch, Task

Labels: TypeAlias = Literal["data", "sampled"]


@dataclass(frozen=True)
class OutputGradients:
    """What one layer's output and weight mean to the loss, as means over samples; on the CPU, float32.

    Attributes:
        moment: ``F = Σ g gᵀ`` over the rows of a sample, g the gradient of the sample's loss at the output
            [d_out, d_out]; None if it was not asked for.
        weight_fisher: per input column the squared gradient of its weights, summed over the outputs [d_in]; None if
            it was not asked for.
    """

    moment: Tensor | None
    weight_fisher: Tensor | None


class _Sink:
    """Takes in the gradients of one layer, batch by batch."""

    def __init__(self, layer: Layer, module: nn.Module, of_weights: bool) -> None:
        self.layer, self.module, self.of_weights = layer, module, of_weights
        size = layer.fan_in if of_weights else layer.output_width
        self.total = torch.zeros(size) if of_weights else torch.zeros(size, size)
        self.samples = 0

    def watch(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook: the output becomes part of a graph although no parameter before it is trained."""
        del module, inputs
        # a copy, because what comes after may write into it
        watched = output if output.requires_grad else output.detach().requires_grad_().clone()
        watched.register_hook(self.take)  # type: ignore[no-untyped-call]
        return watched

    def take(self, gradient: Tensor) -> None:
        """Adds the gradient of the sum of the samples' losses at the output."""
        if self.of_weights:
            return
        rows = gradient.detach().to(torch.float32)
        if self.layer.kind != "linear":
            rows = rows.movedim(1, -1)
        rows = rows.reshape(-1, self.layer.output_width)
        self._add(rows.T @ rows)

    def end_batch(self, samples: int) -> None:
        """After the backward pass."""
        self.samples += samples
        if self.of_weights:
            gradient = self.module.get_parameter("weight").grad
            if gradient is not None:
                self._add(gradient.flatten(1).to(torch.float32).square().sum(dim=0))
                self.module.get_parameter("weight").grad = None

    def _add(self, part: Tensor) -> None:
        if not bool(torch.isfinite(part).all()):
            raise StageError(
                f"the gradient of the loss at layer {self.layer.path!r} is not finite on the calibration data: train "
                "the model with a lower learning rate, or choose whitening: input, which needs no gradient"
            )
        self.total += part.to(self.total)

    def result(self) -> OutputGradients:
        """The mean over all samples."""
        mean = self.total / max(1, self.samples)
        return OutputGradients(None, mean) if self.of_weights else OutputGradients(mean, None)


def collect_output_gradients(
    model: nn.Module,
    task: Task,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    of_weights: bool = False,
    labels: Labels = "data",
    generator: Callable[..., torch.Generator],
) -> dict[str, OutputGradients]:
    """Runs `model` forward and backward over `batches`.

    Args:
        model: in eval mode, on `device`; parameters come back without gradients, their `requires_grad` as before.
        task: gives the loss.
        layers: whose outputs are watched.
        batches: calibration samples.
        device: where to compute.
        of_weights: the squared gradient of the weights in place of the outputs' moments.
        labels: gradients of the loss on the data's targets, or on targets that are drawn from the model's own
            prediction: then F is the Fisher information and not its empirical estimate.
        generator: as `Context.generator`; draws the targets.

    Returns:
        By path.

    Raises:
        StageError: a gradient is not finite; names the layer.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sinks = {layer.path: _Sink(layer, model.get_submodule(layer.path), of_weights) for layer in layers}
    handles = []
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for sink in sinks.values():
            handles.append(sink.module.register_forward_hook(sink.watch))
            sink.module.get_parameter("weight").requires_grad_(of_weights)
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            with torch.enable_grad():
                logits = model(*batch.inputs)
                targets = batch.targets
                if labels == "sampled":
                    targets = drawn_targets(logits, targets, generator("labels", number))
                # the sum of the samples' losses: what a batch holds does not change a sample's gradient
                (task.loss(logits, targets) * len(targets)).backward()  # type: ignore[no-untyped-call]
            for sink in sinks.values():
                sink.end_batch(len(targets))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, trained in wanted.items():
            parameter.requires_grad_(trained)
            parameter.grad = None
    return {path: sink.result() for path, sink in sinks.items()}


def drawn_targets(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Targets drawn from the softmax of `logits` [..., C], where `targets` [...] has some to predict."""
    # by the Gumbel trick, a row at a time: a sample of 49k words needs no second copy of all logits
    drawn = torch.empty_like(targets)
    flat, out = logits.detach().flatten(0, -2), drawn.view(-1)
    for start in range(0, len(flat), 256):
        part = flat[start : start + 256].to("cpu", torch.float32)
        noise = torch.rand(part.shape, generator=generator).clamp_(min=1e-20)
        out[start : start + 256] = (part - (-noise.log_()).log_()).argmax(dim=-1).to(out.device)
    return torch.where(targets == IGNORED, targets, drawn)
