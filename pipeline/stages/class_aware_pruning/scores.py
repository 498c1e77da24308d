"""What each filter does for each class: all layers in one forward and backward pass per batch (METHODS §1.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...analysis.channels.axes import channel_dim
from ...analysis.channels.modes import hooked, plain_eval
from ...errors import StageError
from ...stage import Context
from ...task import Batch, Split
from .scored_samples import Effect, ScoredSamples


@dataclass(frozen=True)
class ScoringSettings:
    """How activations are turned into statistics; see the fields of `ClassAwarePruningConfig`."""

    images_per_class: int = 10
    batch_size: int = 64
    agg: Literal["sum_then_max", "max_then_sum"] = "sum_then_max"
    tau: float = 0.0
    tau_mode: Literal["auto", "absolute", "relative"] = "auto"
    only_correct: bool = False


RELATIVE_TAU = 0.3
"""With `auto` and no `tau`, for layers that are never silent. With it the mean count of SiLU and GELU networks is that
of ReLU networks; the 1e-3 of METHODS §1.3 still counts every filter for every class (both measured)."""
_PROBED_ROWS = 4

_SILENT_SHARE = 1e-3


@dataclass(frozen=True)
class FilterStatistics:
    """Of one layer with F filters, over C classes; float32, CPU. A task without classes counts as one.

    With A the layer's output, G the gradient at it of a sample's loss: cross entropy where a row is of one class, the
    class's part of the task's loss where a sample shows several.

    Attributes:
        class_count: [F], in how many classes the filter matters at its best position; 0 ... C.
        per_class: [C, F], share of the class's images in which it matters, at its best position; classes that no
            sample shows are left out.
        taylor: [C, F], mean over the images of ``|sum over positions of A * G|``.
        fisher: [C, F], mean over the images of ``(sum over positions of A * G) ** 2``.
        relative_tau: share of the layer's mean that counts as 0; None if `tau` was absolute.
    """

    class_count: Tensor
    per_class: Tensor
    taylor: Tensor
    fisher: Tensor
    relative_tau: float | None = None


class _Tally:
    """Sums of one layer over the images of the class at hand, and over finished classes."""

    def __init__(self, settings: ScoringSettings, never_silent: bool) -> None:
        self.settings = settings
        self.relative_tau: float | None = None
        if settings.tau_mode == "relative":
            self.relative_tau = settings.tau
        elif settings.tau_mode == "auto" and never_silent:
            self.relative_tau = settings.tau or RELATIVE_TAU
        self.hits: Tensor | None = None
        self.total: Tensor | None = None
        self.rows: dict[str, list[Tensor]] = {"per_class": [], "taylor": [], "fisher": []}
        self.sums: list[Tensor] = []

    def add(self, product: Tensor, size: Tensor, counted: Tensor | None, path: str) -> None:
        """Takes in ``A * G`` [N, F, positions] of one batch; `counted` bool [N] leaves samples out, None takes all."""
        if counted is not None:
            product, size = product[counted], size[counted]
        if self.relative_tau is not None:
            # per sample, so that neither the batch size nor a confident neighbour matters
            strength = product.abs()
            alive = strength > self.relative_tau * strength.mean(dim=(1, 2), keepdim=True)
        elif self.settings.tau > 0:
            alive = product.abs() * torch.where(size > 0, size, 1.0)[:, None, None] > self.settings.tau
        else:
            alive = product != 0
        hits = alive.sum(dim=0, dtype=torch.float32)
        before = self.total if self.hits is None else self.hits
        if before is not None and before.shape != hits.shape:
            raise StageError(
                f"layer {path!r} gives {before.shape[1]} positions for one batch and {hits.shape[1]} for another: "
                "class counts need inputs of one size; resize or pad the samples to one"
            )
        self.hits = hits if self.hits is None else self.hits + hits
        effect = product.sum(dim=2) * size[:, None]
        sums = [effect.abs().sum(dim=0), effect.square().sum(dim=0)]
        self.sums = sums if not self.sums else [a + b for a, b in zip(self.sums, sums, strict=True)]

    def finish_class(self, images: int) -> None:
        """Turns the sums of one class into its row."""
        assert self.hits is not None
        share = self.hits / images
        self.total = share if self.total is None else self.total + share
        self.rows["per_class"].append(share.amax(dim=1))
        self.rows["taylor"].append(self.sums[0] / images)
        self.rows["fisher"].append(self.sums[1] / images)
        self.hits, self.sums = None, []

    def result(self) -> FilterStatistics:
        """After the last class."""
        assert self.total is not None
        rows = {name: torch.stack(parts).cpu() for name, parts in self.rows.items()}
        count = self.total.amax(dim=1).cpu() if self.settings.agg == "sum_then_max" else rows["per_class"].sum(dim=0)
        return FilterStatistics(count, **rows, relative_tau=self.relative_tau)


def collect(
    model: nn.Module,
    layers: Sequence[str],
    samples: ScoredSamples,
    settings: ScoringSettings,
    context: Context,
) -> dict[str, FilterStatistics]:
    """Statistics of every filter of `layers`, in eval mode and float32, without changing the model.

    One class after the other; never holds feature maps of more than one batch.

    Args:
        model: takes the samples' inputs positionally and returns what the task's answers say, logits [N, C] where each
            row is of one class.
        layers: paths of convolutions and linear layers.
        samples: and with which loss they are scored.
        settings: see there.
        context: device, generator of the choice of images, progress.

    Raises:
        StageError: the model is not float32, returns something else, or a score is not finite.
    """
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64)
    ]
    if wrong:
        raise StageError(
            f"parameter {wrong[0]!r} is {model.get_parameter(wrong[0]).dtype}: class counts need float32, because half "
            "precision turns small gradients into zeros; call model.float() first"
        )
    device = context.device
    model.to(device)
    recorder = _Recorder(model, layers)
    split = samples.split
    at_once = min(settings.batch_size, getattr(split, "largest_batch", settings.batch_size))
    handles = recorder.handles()
    with plain_eval(model), hooked(handles), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        recorder.look_at_one_row(split.batch([0]).to(device))
        never = _never_silent(recorder, samples, device) if samples.names else frozenset[str]()
        tallies = {path: _Tally(settings, path in never) for path in layers}
        text = "scoring classes" if samples.names else "scoring"
        for label in context.progress.track(samples.classes, text, len(samples.classes)):
            chosen = samples.chosen(label, settings.images_per_class, context)
            wanted = _correct(model, split, chosen, settings, device) if settings.only_correct else None
            for start in range(0, len(chosen), at_once):
                part = slice(start, start + at_once)
                batch = split.batch(chosen[part]).to(device)
                effect = samples.gradients(recorder.run(batch), batch.targets, label)
                counted = None if wanted is None else wanted[part].to(device)
                for path, product in recorder.products(effect):
                    tallies[path].add(product, effect.size, counted, path)
            images = len(chosen) if wanted is None else int(wanted.sum())
            for tally in tallies.values():
                tally.finish_class(images)
    model.to("cpu")
    found = {path: tally.result() for path, tally in tallies.items()}
    for path, statistics in found.items():
        if not torch.isfinite(statistics.fisher).all():
            raise StageError(f"layer {path!r} has NaN or infinite gradients: the model or its inputs are out of range")
    return found


class _Recorder:
    """Runs the model, keeps the outputs of layers, and multiplies them with their gradients."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = model
        self.modules = {path: model.get_submodule(path) for path in layers}
        self.outputs: dict[str, list[Tensor]] = {}
        self.of_one_row: dict[str, list[torch.Size]] = {}
        # a copy goes on where an activation that works in place would overwrite what is scored
        self.copied = set(layers)
        self.handed_on: dict[str, list[Tensor]] = {}

    def handles(self) -> list[RemovableHandle]:
        """Hooks on the layers."""
        return [module.register_forward_hook(self._hook(path)) for path, module in self.modules.items()]

    def run(self, batch: Batch) -> Any:
        """The model's output; its graph is kept until `products`."""
        self.outputs.clear()
        self.handed_on.clear()
        return self.model(*batch.inputs)

    def look_at_one_row(self, batch: Batch) -> None:
        """Notes the shapes of one row: what of more rows is longer than these is the axis of rows."""
        self.run(batch)
        self.of_one_row = {path: [tensor.shape for tensor in calls] for path, calls in self.outputs.items()}

    def stop_needless_copies(self) -> None:
        """After a run: from now on copies only the outputs that somebody overwrote."""
        self.copied = {path for path, calls in self.handed_on.items() if any(tensor._version for tensor in calls)}

    def products(self, effect: Effect) -> Iterator[tuple[str, Tensor]]:
        """Per layer ``A * G`` [N, F, positions of all calls], G for the direction of `effect` at the model's output."""
        rows = len(effect.size)
        flat = [tensor for calls in self.outputs.values() for tensor in calls]
        found = torch.autograd.grad(effect.outputs, flat, grad_outputs=effect.directions, allow_unused=True)
        gradients = iter(found)
        for path, calls in self.outputs.items():
            parts = []
            for number, tensor in enumerate(calls):
                gradient = next(gradients)
                product = torch.zeros_like(tensor) if gradient is None else tensor.detach() * gradient
                dim = channel_dim(self.modules[path], product)
                axis = self._axis_of_rows(path, number, product, rows)
                if axis != 0 and dim != axis:
                    product = product.movedim(axis, 0)
                    dim += dim < axis
                if product.shape[0] % rows:
                    raise StageError(
                        f"layer {path!r} runs on {product.shape[0]} rows for {rows} samples, so its filters "
                        "cannot be scored per sample: exclude it"
                    )
                parts.append(_by_filter(product, dim, rows))
            yield path, parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _axis_of_rows(self, path: str, call: int, product: Tensor, rows: int) -> int:
        """0, unless another axis alone is `rows` times as long as for one row: sequences with time first."""
        known = self.of_one_row.get(path, [])
        if rows == 1 or call >= len(known) or len(known[call]) != product.dim():
            return 0
        longer = [i for i, (one, all_) in enumerate(zip(known[call], product.shape, strict=True)) if one != all_]
        return longer[0] if len(longer) == 1 and product.shape[longer[0]] == rows * known[call][longer[0]] else 0

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if output.dtype not in (torch.float32, torch.float64):
                raise StageError(
                    f"layer {path!r} computes in {output.dtype}: class counts need float32, because half precision "
                    "turns small gradients into zeros; remove the model's autocast"
                )
            kept = output if output.requires_grad else output.detach().requires_grad_()
            self.outputs.setdefault(path, []).append(kept)
            if path not in self.copied:
                return kept
            copy = kept.clone()
            self.handed_on.setdefault(path, []).append(copy)
            return copy

        return hook


def _by_filter(product: Tensor, dim: int, rows: int) -> Tensor:
    """[N, F, positions] of a layer's output, whose first axis may hold several positions of one row."""
    if dim == 1 and product.shape[0] == rows:
        return product.flatten(2) if product.dim() > 2 else product[:, :, None]
    last = product.movedim(dim, -1)
    return last.reshape(rows, -1, last.shape[-1]).transpose(1, 2)


def _never_silent(recorder: _Recorder, samples: ScoredSamples, device: torch.device) -> frozenset[str]:
    """Layers of which no output is without effect on a few rows: no ReLU behind them.

    Looked at before anything is counted and row by row, so that the answer does not depend on the batch size.
    """
    silent: dict[str, int] = {}
    total: dict[str, int] = {}
    split = samples.split
    for row in sorted({i * (len(split) - 1) // (_PROBED_ROWS - 1) for i in range(_PROBED_ROWS)}):
        batch = split.batch([row]).to(device)
        effect = samples.gradients(recorder.run(batch), batch.targets, None)
        for path, product in recorder.products(effect):
            silent[path] = silent.get(path, 0) + int((product == 0).sum())
            total[path] = total.get(path, 0) + product.numel()
        recorder.stop_needless_copies()
    return frozenset(path for path, count in total.items() if silent[path] < _SILENT_SHARE * count)


@torch.no_grad()
def _correct(model: nn.Module, split: Split, chosen: Tensor, settings: ScoringSettings, device: torch.device) -> Tensor:
    """Bool [len(chosen)]; all of them if none is right, because a class without images would need no filter at all."""
    right = []
    for start in range(0, len(chosen), settings.batch_size):
        batch = split.batch(chosen[start : start + settings.batch_size]).to(device)
        right.append((model(*batch.inputs).argmax(dim=1) == batch.targets).cpu())
    found = torch.cat(right)
    return found if bool(found.any()) else torch.ones_like(found)
