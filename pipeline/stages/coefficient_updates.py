"""Coefficients fitted once more, to the inputs that the compressed model itself gives (METHODS §3.5).

What a layer reads in the compressed model differs from what it read before by what its predecessors lost, and to its
own coefficients most of that is noise: those that undo it best on the calibration rows fit the noise as well. So where
the outputs are the target they are fitted to either half of the rows and judged on the other, and the coefficients
move only as far as that is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear

from ..errors import StageError
from ..graph import Layer, discover
from ..stage import Context, Json
from ..task import Batch, Task
from .basis_config import BasisSharingConfig
from .basis_fitting import Outcome, calibration_rows, matrix_of
from .factorization import metric_of, refit_coefficients
from .norms import numeric_device
from .second_moments import input_rows


@dataclass
class _Pair:
    """What one layer read before and reads now: X and X̃."""

    own: Tensor
    """``X̃ᵀX̃``, float32 [d_in, d_in]."""
    cross: Tensor
    """``X̃ᵀX``, likewise."""
    rows: int = 0

    @classmethod
    def empty(cls, width: int) -> _Pair:
        return cls(torch.zeros(width, width), torch.zeros(width, width))

    def to(self, device: torch.device) -> _Pair:
        """In float64."""
        return _Pair(self.own.to(device, torch.float64), self.cross.to(device, torch.float64), self.rows)

    def __add__(self, other: _Pair) -> _Pair:
        return _Pair(self.own + other.own, self.cross + other.cross, self.rows + other.rows)


_Halves: TypeAlias = tuple[_Pair, _Pair]
"""Of every other batch, and of the rest."""


def updated(
    dense: nn.Module, compressed: nn.Module, outcome: Outcome, task: Task, config: BasisSharingConfig, context: Context
) -> Outcome:
    """`outcome` with new coefficients, part of the layers after part, in the order of execution.

    Args:
        dense: the model as it was.
        compressed: the same with the factors of `outcome`; gets the new coefficients.
        outcome: what was fitted to the inputs of `dense`.
        task: gives the calibration split.
        config: `updates` parts.
        context: see `Context`.

    Raises:
        StageError: an input is not finite; names the layer.
    """
    split = task.splits["calibration"]
    rows = calibration_rows(split, config, context)
    dense.to(context.device).eval()
    compressed.to(context.device).eval()
    graph = discover(dense, split.batch(rows[:2]).to(context.device).inputs)
    places = {p: (i, j) for i, g in enumerate(outcome.data["groups"]) for j, p in enumerate(g["members"])}
    layers = [layer for layer in graph.layers if layer.path in places]
    tensors = dict(outcome.tensors)

    steps: list[float] = []

    def batches() -> Iterator[Batch]:
        # two at least, so that one can judge the other
        parts = torch.split(rows, min(config.calibration_batch, -(-len(rows) // 2)))
        for part in context.progress.track(parts, "basis_sharing: update", len(parts)):
            yield split.batch(part).to(context.device)

    for part in _parts(layers, config.updates):
        share = min(1.0, config.max_rows / max(1, max(layer.rows for layer in part) * len(rows)))
        pairs = _pairs(dense, compressed, part, batches(), share, context)
        for layer in part:
            i, j = places[layer.path]
            tensors[f"{i}.{j}"], step = _refitted(dense, compressed, layer, pairs[layer.input_key], config, context)
            steps.append(step)
    metrics: dict[str, Json] = {
        **outcome.data["metrics"],
        "updates": config.updates,
        "update_step_median": median(steps),
        "update_step_largest": max(steps),
    }
    return Outcome({**outcome.data, "metrics": metrics}, tensors)


def _parts(layers: Sequence[Layer], count: int) -> list[list[Layer]]:
    """`layers` in `count` stretches; layers with one input stay together."""
    inputs = list(dict.fromkeys(layer.input_key for layer in layers))
    count = min(count, len(inputs))
    place = {key: position * count // len(inputs) for position, key in enumerate(inputs)}
    return [[layer for layer in layers if place[layer.input_key] == k] for k in range(count)]


@torch.no_grad()
def _pairs(
    dense: nn.Module,
    compressed: nn.Module,
    layers: Sequence[Layer],
    batches: Iterator[Batch],
    share: float,
    context: Context,
) -> dict[object, _Halves]:
    """Both moments by `Layer.input_key`, from running both models side by side."""
    first = {layer.input_key: layer for layer in reversed(layers)}
    pairs: dict[object, _Halves] = {k: (_Pair.empty(x.fan_in), _Pair.empty(x.fan_in)) for k, x in first.items()}
    for number, batch in enumerate(batches):
        before = _inputs(dense, list(first.values()), batch)
        after = _inputs(compressed, list(first.values()), batch)
        for key, layer in first.items():
            module, pair = dense.get_submodule(layer.path), pairs[key][number % 2]
            # the same rows of both
            chosen = [context.generator("update rows", layer.path, number) for _ in range(2)]
            old = input_rows(module, before[layer.path], share, chosen[0])
            new = input_rows(module, after[layer.path], share, chosen[1])
            for (x, _), (drifted, _) in zip(old, new, strict=True):
                pair.own += (drifted.T @ drifted).to(pair.own)
                pair.cross += (drifted.T @ x).to(pair.cross)
                pair.rows += len(x)
            if not bool(torch.isfinite(pair.own).all()):
                raise StageError(
                    f"the input of layer {layer.path!r} in the compressed model is not finite: lower ratio, or leave "
                    "the updates out"
                )
    return pairs


class _AllSeen(Exception):
    """Ends a forward pass of whose rest nothing is needed."""


def _inputs(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> dict[str, Tensor]:
    """What each layer reads, by its path; the model runs no further than to the last of them."""
    found: dict[str, Tensor] = {}
    handles = []
    for layer in layers:

        def take(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], path: str = layer.path
        ) -> None:
            del module
            found[path] = args[0] if args else kwargs["input"]
            if len(found) == len(layers):
                raise _AllSeen

        handles.append(model.get_submodule(layer.path).register_forward_pre_hook(take, with_kwargs=True))
    try:
        model(*batch.inputs)
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _refitted(
    dense: nn.Module, compressed: nn.Module, layer: Layer, halves: _Halves, config: BasisSharingConfig, context: Context
) -> tuple[Tensor, float]:
    """New coefficients of one layer, in its own layout, and how far they moved; put into `compressed` as well."""
    module = compressed.get_submodule(layer.path)
    assert isinstance(module, FactorizedLinear | FactorizedConv1d | FactorizedConv2d)
    device = numeric_device(context)
    linear = isinstance(module, FactorizedLinear)

    def matrix(weight: Tensor) -> Tensor:
        """Inputs in rows, as the basis and the coefficients of a linear layer are kept."""
        weight = weight.detach().to(device, torch.float64)
        return weight if linear else weight.flatten(1).T

    basis, old, target = matrix(module.basis.weight), matrix(module.coefficients), matrix_of(dense, layer)
    target = target.to(device, torch.float64)
    outputs = config.update_target == "outputs"

    def fitted(pair: _Pair) -> Tensor:
        cross = (pair.cross / pair.rows).to(device, torch.float64) if outputs else None
        return refit_coefficients(basis, target, metric_of((pair.own / pair.rows).to(device)), cross)

    new, step = fitted(halves[0] + halves[1]), 1.0
    if outputs and min(half.rows for half in halves) > 0:
        moves = [fitted(half) - old for half in halves]
        step = _worthwhile(moves, [half.to(device) for half in reversed(halves)], basis, old, target)
        new = torch.lerp(old, new, step)
    module.coefficients.copy_((new if linear else new.T).reshape(module.coefficients.shape).to(module.coefficients))
    return module.coefficients.detach().cpu().clone(), step


def _worthwhile(moves: Sequence[Tensor], judges: Sequence[_Pair], basis: Tensor, old: Tensor, target: Tensor) -> float:
    """The part of the `moves`, 0 to 1, with the smallest error of the outputs on rows they were not fitted to."""
    gain = size = 0.0
    for move, judge in zip(moves, judges, strict=True):
        moment = basis.T @ judge.own @ basis
        gain += float((move * (basis.T @ (judge.cross @ target) - moment @ old)).sum())
        size += float((move * (moment @ move)).sum())
    return min(1.0, max(0.0, gain / size)) if size > 0 else 1.0
