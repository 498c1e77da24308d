"""Coefficients fitted once more, to the inputs that the compressed model itself gives (METHODS §3.5).

What a layer reads in the compressed model differs from what it read before by what its predecessors lost, and to its
own coefficients most of that is noise: those that undo it best on the calibration rows fit the noise as well. So where
the outputs are the target they are fitted to either half of the rows and judged on the other, and the coefficients
move only as far as that is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

import torch
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear

from ...analysis.layers import Layer, discover
from ...analysis.second_moments import input_rows
from ...errors import StageError
from ...stage import Context, Json
from ...task import Batch, Task
from .config import BasisSharingConfig
from .factorization import Metric, metric_of, refit_coefficients
from .fitting import Outcome, calibration_rows, matrix_of
from .norms import numeric_device


@dataclass
class _Pair:
    """What layers read now, X̃, and where the outputs are the target what they read before, X."""

    own: Tensor
    """``X̃ᵀX̃``, float32 [d_in, d_in]."""
    cross: Tensor | None
    """``X̃ᵀX``, likewise."""
    rows: int = 0

    @classmethod
    def empty(cls, width: int, crossed: bool) -> _Pair:
        return cls(torch.zeros(width, width), torch.zeros(width, width) if crossed else None)

    def __add__(self, other: _Pair) -> _Pair:
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return _Pair(self.own + other.own, cross, self.rows + other.rows)


@dataclass(frozen=True)
class _Fit:
    """A least-squares problem, the same for all layers that are fitted to the same moments."""

    metric: Metric
    cross: Tensor | None

    @classmethod
    def of(cls, pair: _Pair, device: torch.device) -> _Fit:
        cross = None if pair.cross is None else (pair.cross / pair.rows).to(device, torch.float64)
        return cls(metric_of((pair.own / pair.rows).to(device)), cross)


def updated(
    dense: nn.Module, compressed: nn.Module, outcome: Outcome, task: Task, config: BasisSharingConfig, context: Context
) -> Outcome:
    """`outcome` with new coefficients, part of the layers after part, in the order of execution.

    The metrics `update_step_median` and `update_step_largest`, over the layers, say how far the coefficients moved
    towards the best fit, 0 to 1; with `update_target: weights` they move all the way.

    Args:
        dense: the model as it was.
        compressed: the same with the factors of `outcome`; gets the new coefficients.
        outcome: what was fitted to the inputs of `dense`.
        task: gives the calibration split.
        config: `updates` parts; with `refit: group` the moments of a group's inputs are summed (the published method),
            else every layer is fitted to its own.
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
    # every other row, because neighbours are often of one kind
    halves = (rows[0::2], rows[1::2]) if config.update_target == "outputs" else (rows,)
    size = min(config.calibration_batch, getattr(split, "largest_batch", config.calibration_batch))
    chunks = [(half, chunk) for half, some in enumerate(halves) for chunk in torch.split(some, size) if len(chunk)]

    def batches() -> Iterator[tuple[int, Batch]]:
        for half, chunk in context.progress.track(chunks, "basis_sharing: update", len(chunks)):
            yield half, split.batch(chunk).to(context.device)

    together = [[layer.input_key for layer in layers if layer.path in g["members"]] for g in outcome.data["groups"]]
    grouped = config.refit == "group"
    for part in _parts(layers, config.updates, together if grouped else ()):
        share = min(1.0, config.max_rows / max(1, max(layer.rows for layer in part) * len(rows)))
        pairs = _pairs(dense, compressed, part, batches(), len(halves), share, context)
        for fitted, of_halves in _fitted_together(part, pairs, places if grouped else None):
            for layer, (new, step) in zip(
                fitted, _refitted(dense, compressed, fitted, of_halves, context), strict=True
            ):
                i, j = places[layer.path]
                tensors[f"{i}.{j}"] = new
                steps.append(step)
    metrics: dict[str, Json] = {
        **outcome.data["metrics"],
        "updates": config.updates,
        "update_step_median": median(steps),
        "update_step_largest": max(steps),
    }
    return Outcome({**outcome.data, "metrics": metrics}, tensors)


def _parts(layers: Sequence[Layer], count: int, together: Sequence[Sequence[object]]) -> list[list[Layer]]:
    """`layers` in `count` stretches; those with one input stay in one, and those whose inputs are listed `together`."""
    unit: dict[object, object] = {layer.input_key: layer.input_key for layer in layers}
    for keys in together:
        joined = {unit[key] for key in keys}
        first = next((key for key in unit if unit[key] in joined), None)
        unit = {key: unit[first] if of in joined and first is not None else of for key, of in unit.items()}
    units = list(dict.fromkeys(unit.values()))
    count = min(count, len(units))
    place = {of: position * count // len(units) for position, of in enumerate(units)}
    return [[layer for layer in layers if place[unit[layer.input_key]] == k] for k in range(count)]


def _fitted_together(
    layers: Sequence[Layer], pairs: Mapping[object, list[_Pair]], places: Mapping[str, tuple[int, int]] | None
) -> Iterator[tuple[list[Layer], list[_Pair]]]:
    """Layers with the moments that they are fitted to, of every half: their own input's, or summed over their group.

    Args:
        layers: of one part.
        pairs: moments by `Layer.input_key`.
        places: group and place in it by path, where a group is fitted as one (the published method); else None.
    """
    if places is None:
        for key, halves in pairs.items():
            yield [layer for layer in layers if layer.input_key == key], halves
        return
    for group in dict.fromkeys(places[layer.path][0] for layer in layers):
        members = [layer for layer in layers if places[layer.path][0] == group]
        inputs = [pairs[key] for key in dict.fromkeys(layer.input_key for layer in members)]
        yield members, [sum(of[1:], start=of[0]) for of in zip(*inputs, strict=True)]


@torch.no_grad()
def _pairs(
    dense: nn.Module,
    compressed: nn.Module,
    layers: Sequence[Layer],
    batches: Iterator[tuple[int, Batch]],
    halves: int,
    share: float,
    context: Context,
) -> dict[object, list[_Pair]]:
    """Moments by `Layer.input_key`, of every half; of two both kinds, from running both models side by side."""
    first = {layer.input_key: layer for layer in reversed(layers)}
    crossed = halves > 1
    models = (compressed, dense) if crossed else (compressed,)
    pairs: dict[object, list[_Pair]] = {
        key: [_Pair.empty(layer.fan_in, crossed) for _ in range(halves)] for key, layer in first.items()
    }
    for number, (half, batch) in enumerate(batches):
        sides = [_inputs(model, list(first.values()), batch) for model in models]
        for key, layer in first.items():
            module, pair = dense.get_submodule(layer.path), pairs[key][half]
            # the same rows of both
            choosers = [context.generator("update rows", layer.path, number) for _ in sides]
            streams = [
                chain.from_iterable(input_rows(module, x, share, chooser) for x in side[layer.path])
                for side, chooser in zip(sides, choosers, strict=True)
            ]
            for (drifted, _), *others in zip(*streams, strict=True):
                pair.own += (drifted.T @ drifted).to(pair.own)
                pair.rows += len(drifted)
                for x, _ in others:
                    assert pair.cross is not None
                    pair.cross += (drifted.T @ x).to(pair.cross)
            if not bool(torch.isfinite(pair.own).all()):
                raise StageError(
                    f"the input of layer {layer.path!r} in the compressed model is not finite: lower ratio, or leave "
                    "the updates out"
                )
    return pairs


class _AllSeen(Exception):
    """Ends a forward pass of whose rest nothing is needed."""


def _inputs(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> dict[str, list[Tensor]]:
    """What each layer reads, call by call, by its path; the model runs no further than to the last of them."""
    found: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
    wanted = sum(layer.calls for layer in layers)
    handles = []
    for layer in layers:

        def take(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], path: str = layer.path
        ) -> None:
            del module
            found[path].append(args[0] if args else kwargs["input"])
            if sum(map(len, found.values())) == wanted:
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
    dense: nn.Module, compressed: nn.Module, layers: Sequence[Layer], halves: Sequence[_Pair], context: Context
) -> Iterator[tuple[Tensor, float]]:
    """New coefficients of layers that are fitted to the same moments, in their own layout, and how far they moved.

    They are put into `compressed` as well.
    """
    device = numeric_device(context)
    whole = _Fit.of(sum(halves[1:], start=halves[0]), device)
    judged = len(halves) > 1
    fits = [_Fit.of(half, device) for half in halves] if judged and all(half.rows for half in halves) else []
    for layer in layers:
        module = compressed.get_submodule(layer.path)
        assert isinstance(module, FactorizedLinear | FactorizedConv1d | FactorizedConv2d)
        linear = isinstance(module, FactorizedLinear)
        weights = [w.detach().to(device, torch.float64) for w in (module.basis.weight, module.coefficients)]
        basis, old = weights if linear else [w.flatten(1).T for w in weights]
        target = matrix_of(dense, layer).to(device, torch.float64)
        new, step = refit_coefficients(basis, target, whole.metric, whole.cross), 1.0
        if judged:
            moves = [refit_coefficients(basis, target, fit.metric, fit.cross) - old for fit in fits]
            step = _worthwhile(moves, halves[::-1], basis, old, target)
            new = torch.lerp(old, new, step)
        shaped = (new if linear else new.T).reshape(module.coefficients.shape)
        module.coefficients.copy_(shaped.to(module.coefficients))
        yield module.coefficients.detach().cpu().clone(), step


def _worthwhile(moves: Sequence[Tensor], judges: Sequence[_Pair], basis: Tensor, old: Tensor, target: Tensor) -> float:
    """The part of the `moves`, 0 to 1, with the smallest error of the outputs on rows they were not fitted to.

    0 without moves, and where these rows do not see a difference.

    Args:
        moves: of the coefficients, float64 [k, d_out] each.
        judges: of other rows than the move at the same place was fitted to.
        basis: B [d_in, k].
        old: the coefficients [k, d_out].
        target: W [d_in, d_out].
    """
    gain = size = 0.0
    for move, judge in zip(moves, judges, strict=bool(moves)):
        assert judge.cross is not None
        moment = basis.T @ judge.own.to(basis) @ basis
        gain += float((move * (basis.T @ (judge.cross.to(basis) @ target) - moment @ old)).sum())
        size += float((move * (moment @ move)).sum())
    return min(1.0, max(0.0, gain / size)) if size > 0.0 else 0.0
