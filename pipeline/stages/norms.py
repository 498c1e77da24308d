"""The norm in which errors are measured, from calibration data: the published methods are settings of it.

METHODS §3.11: none (plain SVD), activation_scale (ASVD), fisher (FWSVD), input (SVD-LLM), two_sided (ours, §3.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..graph import Layer
from ..stage import Context
from ..task import Batch, Task
from .factorization import Metric, diagonal_metric, identity_metric, metric_of
from .grouping import Candidate
from .output_gradients import Labels, OutputGradients, collect_output_gradients
from .second_moments import SecondMoment, collect_second_moments

Whitening: TypeAlias = Literal["none", "activation_scale", "fisher", "input", "two_sided"]


@dataclass(frozen=True)
class Calibration:
    """What is collected, and on which samples.

    Attributes:
        whitening: the norm.
        rows: int64, indices into the calibration split.
        batch: samples per forward pass.
        max_rows: tokens or positions per layer that enter a second moment.
        labels: see `collect_output_gradients`.
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

    @property
    def matrices_kept(self) -> tuple[bool, bool]:
        """Whether a [d_in, d_in] per input and a [d_out, d_out] per layer are kept."""
        return self.whitening in ("input", "two_sided"), self.whitening == "two_sided"


@dataclass(frozen=True)
class Norms:
    """What was collected for some candidates.

    Attributes:
        moments: by `Layer.input_key`; empty where the norm needs none.
        gradients: by path; empty where the norm needs none.
        calibration: how.
        device: where float64 algebra runs.
    """

    moments: Mapping[object, SecondMoment]
    gradients: Mapping[str, OutputGradients]
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
            fisher = self.gradients[layer.path].weight_fisher
            assert fisher is not None
            return diagonal_metric(fisher.to(self.device, torch.float64).sqrt())
        moment = self.moments[layer.input_key]
        if whitening == "activation_scale":
            return diagonal_metric(moment.magnitude.to(self.device, torch.float64) ** self.calibration.exponent)
        return metric_of(moment.matrix.to(self.device))

    def output_roots(self, members: Sequence[Layer]) -> list[Tensor] | None:
        """Per member L [d_out, d_out] with ``L Lᵀ = F``, regularised as the inputs' moments; None if one-sided."""
        if self.calibration.whitening != "two_sided":
            return None
        roots = []
        for layer in members:
            moment = self.gradients[layer.path].moment
            assert moment is not None
            roots.append(metric_of(moment.to(self.device)).root.T.contiguous())
        return roots

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
    moments: dict[object, SecondMoment] = {}
    gradients: dict[str, OutputGradients] = {}
    if calibration.whitening in ("activation_scale", "input", "two_sided"):
        first = {layer.input_key: layer for layer in reversed(members)}
        by_path = collect_second_moments(
            model,
            list(first.values()),
            calibration.batches(task, context, "calibration"),
            len(calibration.rows),
            calibration.max_rows,
            context.device,
            context.generator,
        )
        moments = {key: by_path[layer.path] for key, layer in first.items()}
    if calibration.whitening in ("fisher", "two_sided"):
        gradients = collect_output_gradients(
            model,
            task,
            members,
            calibration.batches(task, context, "gradients"),
            context.device,
            of_weights=calibration.whitening == "fisher",
            labels=calibration.labels,
            generator=context.generator,
        )
    return Norms(moments, gradients, calibration, numeric_device(context))


def numeric_device(context: Context) -> torch.device:
    """Where float64 algebra runs: not every accelerator has float64."""
    return context.device if context.device.type == "cuda" else torch.device("cpu")
