"""What each filter does for each class: all layers in one forward and backward pass per batch (METHODS §1.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...analysis.channels.axes import channel_dim
from ...analysis.channels.modes import hooked, plain_eval
from ...errors import StageError
from ...stage import Context
from ...task import Batch, Split


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
_CLASSES_OF_NONE = 10
"""So many times `images_per_class` samples are looked at where the task has no classes."""

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of outputs [N, ...] and targets [N, ...], scalar."""

_SILENT_SHARE = 1e-3


@dataclass(frozen=True)
class FilterStatistics:
    """Of one layer with F filters, over C classes; float32, CPU. A task without classes counts as one.

    With A the layer's output, G the gradient of a sample's loss at it, cross entropy where there are classes:

    Attributes:
        class_count: [F], in how many classes the filter matters at its best position; 0 ... C.
        per_class: [C, F], share of the class's images in which it matters, at its best position.
        taylor: [C, F], mean over the images of ``|sum over positions of A * G|``.
        fisher: [C, F], mean over the images of ``(sum over positions of A * G) ** 2``.
        relative_tau: share of the layer's mean that counts as 0; None if `tau` was absolute.
    """

    class_count: Tensor
    per_class: Tensor
    taylor: Tensor
    fisher: Tensor
    relative_tau: float | None = None


def logit_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each sample's own cross entropy at its logits, as direction and size.

    A sample so confident that its gradient is exactly 0 in float32 would vanish from every count and take its class
    along, so the direction is then that of the target logit, of size 0. Directions are scaled to largest entry 1 lest
    the gradient of an almost confident sample underflows on its way back.

    Args:
        logits: float32 [N, C].
        targets: int64 [N].

    Returns:
        directions [N, C] and sizes [N]; the gradient is their product.
    """
    onehot = nn.functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
    gradient = torch.softmax(logits.detach(), dim=1) - onehot
    size = gradient.abs().amax(dim=1)
    direction = torch.where(size[:, None] > 0, gradient / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None], onehot)
    return direction, size


def loss_gradients(loss: Loss, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each sample's loss at its output, as direction and size like `logit_gradients`.

    Args:
        loss: a mean over the samples, so N times its gradient is that of each.
        output: [N, ...].
        targets: [N, ...].

    Returns:
        directions [N, ...] of largest entry 1, or 0 where there is no gradient, and sizes [N].
    """
    leaf = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, targets) * len(output), leaf)
    size = gradient.abs().flatten(1).amax(dim=1) if gradient.dim() > 1 else gradient.abs()
    scale = size.clamp_min(torch.finfo(size.dtype).tiny).view(-1, *[1] * (gradient.dim() - 1))
    return gradient / scale, size


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
    split: Split,
    labels: Sequence[str],
    settings: ScoringSettings,
    context: Context,
    loss: Loss | None = None,
) -> dict[str, FilterStatistics]:
    """Statistics of every filter of `layers`, in eval mode and float32, without changing the model.

    One class after the other; never holds feature maps of more than one batch.

    Args:
        model: takes the split's inputs positionally and returns logits [N, C], any output [N, ...] without classes.
        layers: paths of convolutions and linear layers.
        split: has at least one sample of every class.
        labels: names of the classes; none: all samples are one class.
        settings: see there.
        context: device, generator of the choice of images, progress.
        loss: of the task, whose gradients are taken where there are no classes.

    Raises:
        StageError: the model is not float32, returns no logits, or a score is not finite.
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
    gradients = logit_gradients if labels or loss is None else partial(loss_gradients, loss)
    at_once = min(settings.batch_size, getattr(split, "largest_batch", settings.batch_size))
    everything = range(max(1, len(labels)))
    handles = recorder.handles()
    with plain_eval(model), hooked(handles), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        never = _never_silent(recorder, split, len(labels), device) if labels else frozenset[str]()
        tallies = {path: _Tally(settings, path in never) for path in layers}
        for label in context.progress.track(everything, "scoring classes" if labels else "scoring", len(everything)):
            chosen = _choose(split, label if labels else None, settings.images_per_class, context)
            wanted = _correct(model, split, chosen, settings, device) if settings.only_correct else None
            for start in range(0, len(chosen), at_once):
                part = slice(start, start + at_once)
                batch = split.batch(chosen[part]).to(device)
                logits = recorder.run(batch)
                _check_logits(logits, len(batch.targets), len(labels))
                direction, size = gradients(logits, batch.targets)
                counted = None if wanted is None else wanted[part].to(device)
                for path, product in recorder.products(logits, direction):
                    tallies[path].add(product, size, counted, path)
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

    def stop_needless_copies(self) -> None:
        """After a run: from now on copies only the outputs that somebody overwrote."""
        self.copied = {path for path, calls in self.handed_on.items() if any(tensor._version for tensor in calls)}

    def products(self, logits: Tensor, direction: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Per layer ``A * G`` [N, F, positions of all calls], G for the gradient `direction` at the logits."""
        rows = len(logits)
        flat = [tensor for calls in self.outputs.values() for tensor in calls]
        gradients = iter(torch.autograd.grad(logits, flat, grad_outputs=direction, allow_unused=True))
        for path, calls in self.outputs.items():
            parts = []
            for tensor in calls:
                gradient = next(gradients)
                product = torch.zeros_like(tensor) if gradient is None else tensor.detach() * gradient
                if product.shape[0] % rows:
                    raise StageError(
                        f"layer {path!r} runs on {product.shape[0]} rows for {rows} samples, so its filters "
                        "cannot be scored per sample: exclude it"
                    )
                parts.append(_by_filter(product, channel_dim(self.modules[path], product), rows))
            yield path, parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

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


def _never_silent(recorder: _Recorder, split: Split, classes: int, device: torch.device) -> frozenset[str]:
    """Layers of which no output is without effect on a few rows: no ReLU behind them.

    Looked at before anything is counted and row by row, so that the answer does not depend on the batch size.
    """
    silent: dict[str, int] = {}
    total: dict[str, int] = {}
    for row in sorted({i * (len(split) - 1) // (_PROBED_ROWS - 1) for i in range(_PROBED_ROWS)}):
        batch = split.batch([row]).to(device)
        logits = recorder.run(batch)
        _check_logits(logits, len(batch.targets), classes)
        direction, _ = logit_gradients(logits, batch.targets)
        for path, product in recorder.products(logits, direction):
            silent[path] = silent.get(path, 0) + int((product == 0).sum())
            total[path] = total.get(path, 0) + product.numel()
        recorder.stop_needless_copies()
    return frozenset(path for path, count in total.items() if silent[path] < _SILENT_SHARE * count)


def _choose(split: Split, label: int | None, most: int, context: Context) -> Tensor:
    """Rows of the class `label`, at most `most`; ten times as many of all rows without classes."""
    if label is None:
        rows, most, name = torch.arange(len(split)), _CLASSES_OF_NONE * most, -1
    else:
        rows, name = (split.targets == label).nonzero().flatten(), label
    order = torch.randperm(len(rows), generator=context.generator("scoring images", name))
    return rows[order[:most]].sort().values


@torch.no_grad()
def _correct(model: nn.Module, split: Split, chosen: Tensor, settings: ScoringSettings, device: torch.device) -> Tensor:
    """Bool [len(chosen)]; all of them if none is right, because a class without images would need no filter at all."""
    right = []
    for start in range(0, len(chosen), settings.batch_size):
        batch = split.batch(chosen[start : start + settings.batch_size]).to(device)
        right.append((model(*batch.inputs).argmax(dim=1) == batch.targets).cpu())
    found = torch.cat(right)
    return found if bool(found.any()) else torch.ones_like(found)


def _check_logits(logits: Any, rows: int, classes: int) -> None:
    if not isinstance(logits, Tensor) or (classes and tuple(logits.shape) != (rows, classes)):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StageError(f"the model returns {shape} where logits ({rows}, {classes}) are needed for scores per class")
    if logits.dtype not in (torch.float32, torch.float64):
        raise StageError(f"the model computes in {logits.dtype}: class counts need float32, remove its autocast")
