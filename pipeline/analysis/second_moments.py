"""Second moments of layer inputs, streamed over calibration batches (METHODS §3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..task import Batch
from .layers import Layer

_PATCH_BYTES = 64 * 2**20  # the largest unfolded block
_LARGE = 1_000_000  # rows beyond which float32 sums lose digits that the whitening needs (METHODS §3.4)


@dataclass(frozen=True)
class SecondMoment:
    """``G = XᵀX / rows`` of what one layer multiplies.

    Attributes:
        matrix: [d_in, d_in] on the CPU; float32, float64 beyond a million rows.
        rows: rows of X that were used.
        seen: rows that went by; more than `rows` where the cap bit.
        magnitude: mean of ``|X|`` per column, float32 [d_in].
    """

    matrix: Tensor
    rows: int
    seen: int
    magnitude: Tensor


class _Sink:
    """Takes in the inputs of one layer, batch by batch."""

    def __init__(self, layer: Layer, samples: int, max_rows: int, generator: Callable[..., torch.Generator]) -> None:
        self.path = layer.path
        self.share = min(1.0, max_rows / max(1, layer.rows * samples))
        self.generator = generator
        large = layer.rows * samples * self.share > _LARGE
        self.total = torch.zeros(layer.fan_in, layer.fan_in, dtype=torch.float64 if large else torch.float32)
        self.magnitude = torch.zeros(layer.fan_in)
        self.rows = self.seen = self.batches = 0

    def take(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """A forward pre-hook."""
        chooser = self.generator("rows", self.path, self.batches)
        self.batches += 1
        for rows, seen in input_rows(module, args[0] if args else kwargs["input"], self.share, chooser):
            partial = rows.T @ rows
            if not bool(torch.isfinite(partial).all()):
                raise StageError(
                    f"the input of layer {self.path!r} is not finite, or too large to square in float32, "
                    f"on calibration batch {self.batches}: train the model with a lower learning rate, or leave the "
                    "layer out with layers.exclude"
                )
            self.total += partial.to(self.total)
            self.magnitude += rows.abs().sum(dim=0).to(self.magnitude)
            self.rows += rows.shape[0]
            self.seen += seen

    def result(self) -> SecondMoment:
        """The mean over all rows."""
        count = max(1, self.rows)
        return SecondMoment(self.total / count, self.rows, self.seen, self.magnitude / count)


@contextmanager
def watching_inputs(
    model: nn.Module, layers: Sequence[Layer], samples: int, max_rows: int, generator: Callable[..., torch.Generator]
) -> Iterator[Callable[[], dict[str, SecondMoment]]]:
    """While the context lasts, what each of `layers` multiplies is averaged, whoever runs `model`.

    Args:
        model: in eval mode.
        layers: one per different input (`Layer.input_key`).
        samples: how many samples will go by in all.
        max_rows: cap on rows per layer; beyond it a random share of tokens or positions is taken.
        generator: as `Context.generator`; chooses rows.

    Yields:
        Gives the moments by path; to be called when all has gone by.

    Raises:
        StageError: during a pass, where an input is not finite; names the layer.
    """
    sinks = {layer.path: _Sink(layer, samples, max_rows, generator) for layer in layers}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(sink.take, with_kwargs=True) for path, sink in sinks.items()
    ]
    try:
        yield lambda: {path: sink.result() for path, sink in sinks.items()}
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_second_moments(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    samples: int,
    max_rows: int,
    device: torch.device,
    generator: Callable[..., torch.Generator],
) -> dict[str, SecondMoment]:
    """Runs `model` over `batches` and averages the outer products of what each of `layers` multiplies.

    Args:
        model: in eval mode, on `device`.
        layers: see `watching_inputs`, as for `samples`, `max_rows` and `generator`.
        batches: calibration samples.
        samples: how many samples `batches` has in all.
        max_rows: cap on rows per layer.
        device: where to compute.
        generator: chooses rows.

    Returns:
        By path.

    Raises:
        StageError: an input is not finite; names the layer.
    """
    with watching_inputs(model, layers, samples, max_rows, generator) as found:
        for batch in batches:
            model(*batch.to(device).inputs)
    return found()


def input_rows(module: nn.Module, x: Tensor, share: float, generator: torch.Generator) -> Iterable[tuple[Tensor, int]]:
    """What a layer multiplies with its matrix, in blocks: rows float32 [n, d_in], and how many they stand for.

    Args:
        module: an `nn.Linear`, or a convolution: its rows are im2col patches in the order (channel, *kernel).
        x: its input.
        share: of the rows to take, in (0, 1].
        generator: chooses them.
    """
    x = x.detach().to(torch.float32)
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        yield rows[_some(rows.shape[0], share, generator, rows.device)], rows.shape[0]
        return
    x = x if x.dim() == module.weight.dim() else x[None]
    if isinstance(module.padding, str) or any(module.padding):
        # also what `same` pads, which is not symmetric for even kernels
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        # im2col knows images only: one of width 1
        x, kernel, dilation, stride = x[..., None], (*kernel, 1), (*dilation, 1), (*stride, 1)
    positions = 1
    for i in range(2):
        positions *= (x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
    per_sample = positions * x.shape[1] * kernel[0] * kernel[1] * x.element_size()
    for part in torch.split(x, max(1, _PATCH_BYTES // max(1, per_sample))):
        patches = nn.functional.unfold(part, kernel, dilation=dilation, stride=stride)
        chosen = patches[:, :, _some(positions, share, generator, x.device)]
        yield chosen.transpose(1, 2).reshape(-1, patches.shape[1]), part.shape[0] * positions


def _some(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor | slice:
    if share >= 1.0:
        return slice(None)
    wanted = max(1, round(count * share))
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(device)
