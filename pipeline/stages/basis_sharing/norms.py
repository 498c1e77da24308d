"""The norm in which errors are measured, from calibration data: the published methods are settings of it.

METHODS §3.11: none (plain SVD), activation_scale (ASVD), fisher (FWSVD), input (SVD-LLM), two_sided (§3.5; published
since as KFAC-SVD, ICML 2026). Ours is what it is combined with: groups of readers, bases that are shared, coefficients
that are refitted per layer, and ranks in units of loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...analysis.layers import Layer
from ...analysis.output_gradients import Gradients, Labels, collect_gradients, is_pulled_back
from ...analysis.second_moments import SecondMoment, collect_second_moments, watching_inputs
from ...stage import Context
from ...task import Batch, Task
from .factorization import Metric, diagonal_metric, identity_metric, metric_of
from .grouping import Candidate

Whitening: TypeAlias = Literal["none", "activation_scale", "fisher", "input", "two_sided"]


@dataclass(frozen=True)
class Calibration:
    """What is collected, and on which samples.

    Attributes:
        whitening: the norm.
        rows: int64, indices into the calibration split.
        batch: samples per forward pass.
        max_rows: tokens or positions per layer that enter a second moment.
        labels: see `collect_gradients`.
        exponent: of the mean magnitude, for `activation_scale`.
    """

    whitening: Whitening
    rows: Tensor
    batch: int
    max_rows: int
    labels: Labels = "data"
    exponent: float = 0.5

    def batches(self, task: Task, context: Context, what: str) -> Iterator[Batch]:
        """The chosen samples, with progress."""
        parts = torch.split(self.rows, self.batch)
        for part in context.progress.track(parts, f"basis_sharing: {what}", len(parts)):
            yield task.splits["calibration"].batch(part)

    def weights_kept(self, candidate: Candidate) -> dict[object, int]:
        """Numbers that the statistics of `candidate` hold, by what they belong to; equal keys are kept once."""
        found: dict[object, int] = {}
        for layer in candidate.members:
            if self.whitening in ("input", "two_sided"):
                found[layer.input_key] = layer.fan_in**2
            if self.whitening == "two_sided":
                found[layer.path] = (layer.fan_in if is_pulled_back(layer) else layer.output_width) ** 2
        return found


@dataclass(frozen=True)
class Norms:
    """What was collected for some candidates.

    Attributes:
        moments: by `Layer.input_key`; empty where the norm needs none.
        gradients: empty where the norm needs none.
        calibration: how.
        device: where float64 algebra runs.
    """

    moments: Mapping[object, SecondMoment]
    gradients: Gradients
    calibration: Calibration
    device: torch.device

    def metrics(self, members: Sequence[Layer]) -> dict[str, Metric]:
        """The norm of every member's input by path, one object per different norm; float64, made when asked for."""
        made: dict[object, Metric] = {}
        found: dict[str, Metric] = {}
        for layer in members:
            # the Fisher information belongs to a weight, all else to an input
            key = layer.path if self.calibration.whitening == "fisher" else layer.input_key
            if key not in made:
                made[key] = self._metric(layer)
            found[layer.path] = made[key]
        return found

    def _metric(self, layer: Layer) -> Metric:
        whitening = self.calibration.whitening
        if whitening == "none":
            return identity_metric(layer.fan_in, self.device)
        if whitening == "fisher":
            return diagonal_metric(self.gradients.weights[layer.path].to(self.device, torch.float64).sqrt())
        moment = self.moments[layer.input_key]
        if whitening == "activation_scale":
            return diagonal_metric(moment.magnitude.to(self.device, torch.float64) ** self.calibration.exponent)
        return metric_of(moment.matrix.to(self.device))

    def targets(self, layers: Sequence[Layer], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a basis should span, by path: W, weighed by what its outputs mean to the loss if the norm is two-sided.

        Args:
            layers: of a candidate.
            matrices: W by path, float64.
        """
        if self.calibration.whitening != "two_sided":
            return {layer.path: matrices[layer.path] for layer in layers}
        found = {}
        for layer in layers:
            pulled = self.gradients.pulled_back.get(layer.path)
            root = self._root(self.gradients.outputs[layer.path] if pulled is None else pulled)
            found[layer.path] = matrices[layer.path] @ root if pulled is None else root
        return found

    def _root(self, moment: Tensor) -> Tensor:
        """L with ``L Lᵀ`` the moment, regularised as the inputs' are; float64."""
        return metric_of(moment.to(self.device)).root.T.contiguous()

    def used(self, members: Sequence[Layer]) -> list[dict[str, int]]:
        """Rows behind the members' second moments, for the report."""
        found = [self.moments.get(layer.input_key) for layer in members]
        return [{"used": m.rows, "seen": m.seen} for m in found if m is not None]


def collect(
    model: nn.Module, task: Task, candidates: Sequence[Candidate], calibration: Calibration, context: Context
) -> Norms:
    """Runs the calibration data through `model`, forward, and backward where the norm needs gradients.

    Raises:
        StageError: an input or a gradient is not finite; names the layer.
    """
    members = [layer for candidate in candidates for layer in candidate.members]
    one_each = list({layer.input_key: layer for layer in reversed(members)}.values())
    whitening, rows = calibration.whitening, calibration.rows
    if whitening in ("none", "activation_scale", "input"):
        moments: Mapping[str, SecondMoment] = {}
        if whitening != "none":
            moments = collect_second_moments(
                model,
                one_each,
                calibration.batches(task, context, "calibration"),
                len(rows),
                calibration.max_rows,
                context.device,
                context.generator,
            )
        gradients = Gradients()
    else:
        watched = one_each if whitening == "two_sided" else []
        # one forward pass serves both sides
        with watching_inputs(model, watched, len(rows), calibration.max_rows, context.generator) as found:
            gradients = collect_gradients(
                model,
                task,
                members,
                calibration.batches(task, context, "calibration"),
                context.device,
                of_weights=whitening == "fisher",
                labels=calibration.labels,
                generator=context.generator,
            )
        moments = found()
    by_key: dict[object, SecondMoment] = {
        layer.input_key: moments[layer.path] for layer in one_each if layer.path in moments
    }
    return Norms(by_key, gradients, calibration, numeric_device(context))


def numeric_device(context: Context) -> torch.device:
    """Where float64 algebra runs: not every accelerator has float64."""
    return context.device if context.device.type == "cuda" else torch.device("cpu")
