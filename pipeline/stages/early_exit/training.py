"""Trains a network together with its exits, or the heads alone on the features of a network that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from edgewright.models.layers.exit_policies import policy_named
from edgewright.models.layers.multi_exit import MultiExit

from ...errors import StageError
from ...stage import Context, Json, StageConfig
from ...task import Batch, Split, Task, batches, split_of
from ...tasks.image_classification import ImageClassification
from ...tasks.splits import TensorSplit
from ...training.label_smoothing import smoothed_loss
from ...training.model_output import training_logits
from ...training.training import TrainingConfig, train_model

_CACHE_BYTES = 1 << 30  # of pooled features of the train split
_ROWS_FOR_STATISTICS = 2048
_LEAST_VARIATION = 0.01


class ExitTrainingConfig(StageConfig):
    """How a network with exits is trained."""

    training: TrainingConfig = TrainingConfig(epochs=10, learning_rate=0.01)
    """Joint training of the network and its heads."""
    freeze_backbone: bool = False
    """Leave the network as it is, batch norm statistics too, and train the heads only."""
    head_epochs: int = Field(default=20, ge=0)
    """Epochs in which the heads alone are trained (AdamW): before joint training, or instead of it where the backbone
    is frozen. Cheap: the network runs over the train split once where it can."""
    head_learning_rate: float = Field(default=0.01, gt=0.0)
    """For `head_epochs`."""
    max_backbone_drop: float | None = Field(default=0.02, ge=0.0)
    """Where joint training costs the network's own end more validation accuracy than this, it is undone and the heads
    trained alone are kept; None keeps whatever it gives."""
    exit_loss_mode: Literal["pos_weight", "uniform_scale"] = "pos_weight"
    """For class_exclusion and class_exclusion_permanent, what the factor 4 (C - 1) multiplies: the positive terms of
    the loss (what is meant), or all of it (what the published code does)."""
    kappa: float = Field(default=1.0, gt=0.0)
    """Divides the loss of all exits."""
    distillation: float = Field(default=0.0, ge=0.0)
    """Weight of the divergence of each head from the network's own end; 0 is off."""
    temperature: float = Field(default=2.0, gt=0.0)
    """Softens both sides of the distillation."""

    @model_validator(mode="after")
    def _check_epochs(self) -> ExitTrainingConfig:
        if self.freeze_backbone and self.head_epochs == 0:
            raise ValueError("freeze_backbone with head_epochs: 0 would train nothing")
        return self


def exit_weights(exits: int) -> list[float]:
    """``w_i = 1 / (K - i + 1)``: later exits weigh more (METHODS §2.2)."""
    return [1.0 / (exits - i + 1) for i in range(exits)]


def exit_loss(
    logits: Sequence[Tensor],
    teacher: Tensor,
    targets: Tensor,
    weights: Sequence[float],
    policy: str,
    config: ExitTrainingConfig,
) -> Tensor:
    """The weighted loss of all heads, scalar (METHODS §2.2, §2.7).

    Binary cross entropy of each class on its own for policies that read each logit on its own, where a head has to be
    sure which classes are wrong; cross entropy for policies on the softmax.

    Args:
        logits: of K heads, [N, C].
        teacher: logits [N, C] of the network's own end; no gradient flows into them.
        targets: int64 [N].
        weights: K numbers.
        policy: name of the exit policy.
        config: see `ExitTrainingConfig`.
    """
    total = torch.zeros((), device=targets.device)
    for weight, head in zip(weights, logits, strict=True):
        if policy_named(policy).one_against_rest:
            value = _class_loss(head, targets, config.exit_loss_mode)
        else:
            value = functional.cross_entropy(head, targets)
        if config.distillation > 0.0:
            t = config.temperature
            wanted = functional.log_softmax(teacher.detach() / t, dim=1)
            given = functional.log_softmax(head / t, dim=1)
            divergence = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
            value = value + config.distillation * t * t * divergence
        total = total + weight * value
    return total / config.kappa


def _class_loss(logits: Tensor, targets: Tensor, mode: str) -> Tensor:
    classes = logits.shape[1]
    wanted = functional.one_hot(targets, classes).to(logits.dtype)
    factor = 4.0 * (classes - 1)
    if mode == "uniform_scale":
        return factor * functional.binary_cross_entropy_with_logits(logits, wanted)
    weight = torch.tensor(factor, dtype=logits.dtype, device=logits.device)
    return functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)


def train_jointly(model: MultiExit, task: Task, config: ExitTrainingConfig, context: Context) -> list[dict[str, Json]]:
    """Trains everything: the task's loss at the end plus `exit_loss`; in place, resumable; one row per epoch."""
    weights = exit_weights(len(model.specs))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        network = cast(MultiExit, module)
        *heads, output = network.all_logits(*batch.inputs)
        last = training_logits(network.base, output)
        own = smoothed_loss(task, last, batch.targets, config.training.label_smoothing)
        return own + exit_loss(heads, last, batch.targets, weights, model.policy.name, config)

    return train_model(model, task, config.training, context, "joint", loss)


class _Heads(nn.Module):
    """The layers of all heads, on standardised features: what trains while the network stays as it is.

    Features of a trained network differ in scale by orders of magnitude, and a linear layer learns slowly on them.
    Shift and scale are folded into the first layers afterwards, so they cost nothing. The last layers start at zero:
    for linear heads the problem is convex.
    """

    def __init__(
        self, model: MultiExit, means: Sequence[Tensor], scales: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.means, self.scales = list(means), list(scales)
        self.heads = nn.ModuleList()
        for i in range(len(model.specs)):
            layers = [nn.Linear(given.in_features, given.out_features) for given in model.head(i).layers]
            for layer in layers[:-1]:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(layers[-1].weight)
            nn.init.zeros_(layers[-1].bias)
            self.heads.append(nn.ModuleList(layers))

    def layers(self, index: int) -> list[nn.Linear]:
        """Of head `index`, in order."""
        return [cast(nn.Linear, layer) for layer in cast(nn.ModuleList, self.heads[index])]

    def forward(self, *features: Tensor) -> list[Tensor]:
        """Pooled features [N, width] of K exits to K logits [N, C]."""
        found = []
        for i, (x, mean, scale) in enumerate(zip(features, self.means, self.scales, strict=True)):
            *hidden, last = self.layers(i)
            x = (x - mean.to(x.device)) / scale.to(x.device)
            for layer in hidden:
                x = torch.relu(layer(x))
            found.append(last(x))
        return found

    @torch.no_grad()
    def fold_into(self, model: MultiExit) -> None:
        """Writes the same functions of the plain features into the heads of `model`."""
        for i in range(len(self.heads)):
            for layer, target in zip(self.layers(i), model.head(i).layers, strict=True):
                target.load_state_dict(layer.state_dict())
            first, given = model.head(i).layers[0], self.layers(i)[0]
            weight = given.weight / self.scales[i]
            first.weight.copy_(weight)
            first.bias.copy_(given.bias - weight @ self.means[i])


def train_heads(
    model: MultiExit,
    task: Task,
    config: ExitTrainingConfig,
    context: Context,
    *,
    augment: bool,
    name: str = "heads",
) -> list[dict[str, Json]]:
    """Trains the heads from scratch, the network in eval mode and untouched; resumable; one row per epoch.

    Where nothing is augmented and there is room, the network runs over the train split once, and the heads are trained
    on its pooled features. All heads weigh the same, since they do not compete for anything.

    Args:
        model: on the CPU, in eval mode; so it is afterwards.
        task: gives the train split.
        config: `head_epochs` and the loss.
        context: see `Context`.
        augment: whether to see the samples varied as the task does.
        name: what its progress is saved under.

    Raises:
        StageError: a feature is not finite.
    """
    split = split_of(task, "train", needed_by="training of the exits")
    cached = not (augment and _augments(task, context)) and _cache_bytes(model, split) <= _CACHE_BYTES
    rows = split if cached else _Part(split, torch.randperm(len(split), generator=context.generator("part")))
    features = _features(model, rows, context)
    moments = [torch.std_mean(x, dim=0, correction=0) for x in features[:-1]]
    scales = [_scale(std, mean) for std, mean in moments]
    heads = _Heads(model, [mean for _, mean in moments], scales, context.generator("hidden layers"))
    training = TrainingConfig(
        epochs=config.head_epochs,
        batch_size=config.training.batch_size,
        learning_rate=config.head_learning_rate,
        optimizer="adamw",
        weight_decay=1e-4,
        gradient_clip=None,
    )
    weights = [1.0] * len(model.specs)
    if cached:
        task = ImageClassification({"train": TensorSplit(features, split.targets)}, task.labels, name=task.name)
    model.to(context.device).eval()

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        if cached:
            *pooled, teacher = batch.inputs
        else:
            with torch.no_grad():
                pooled, teacher = model.pooled(*batch.inputs)
        return exit_loss(module(*pooled), teacher, batch.targets, weights, model.policy.name, config)

    log = train_model(heads, task, training, context, name, loss)
    model.to("cpu").eval()
    heads.fold_into(model)
    return log


def _scale(std: Tensor, mean: Tensor) -> Tensor:
    """What features are divided by.

    One that never varies stays at zero and learns nothing. One that varies by less than a hundredth of its mean is
    taken to vary by that: its first digits are the same in all rows, and a weight that lifts the last ones lifts the
    rounding errors of whatever computes it, PyTorch or ONNX Runtime, by as much.
    """
    return torch.where(std > 1e-8, torch.maximum(std, _LEAST_VARIATION * mean.abs()), 1.0)


def _augments(task: Task, context: Context) -> bool:
    split = split_of(task, "train", needed_by="training of the exits")
    probe = split.batch(range(min(2, len(split))))
    return task.augment(probe, context.generator("probe")) is not probe


def _cache_bytes(model: MultiExit, split: Split) -> int:
    width = model.classes + sum(model.head(i).layers[0].in_features for i in range(len(model.specs)))
    return len(split) * width * 4


class _Part:
    """Some rows of a split, enough for statistics."""

    def __init__(self, split: Split, order: Tensor) -> None:
        self._split, self._rows = split, order[:_ROWS_FOR_STATISTICS]
        self.targets = split.targets[self._rows]

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """Of the rows."""
        return [self._split.sample_digests[row] for row in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices` of this part."""
        return self._split.batch(self._rows[torch.as_tensor(indices)])


@torch.no_grad()
def _features(model: MultiExit, split: Split, context: Context) -> list[Tensor]:
    """Pooled features [rows, width] of every exit, then the logits [rows, C] of the network's own end."""
    model.to(context.device).eval()
    parts: list[list[Tensor]] = []
    for batch in context.progress.track(batches(split, 256), "features of the exits", -(-len(split) // 256)):
        pooled, last = model.pooled(*batch.to(context.device).inputs)
        parts.append([x.cpu() for x in (*pooled, last)])
    model.to("cpu")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    names = [*(f"the output of {spec.at!r}" for spec in model.specs), "the network's own output"]
    for name, x in zip(names, columns, strict=True):
        if not torch.isfinite(x).all():
            raise StageError(
                f"{name} is not finite for {int((~torch.isfinite(x).all(dim=1)).sum())} of {len(x)} train rows: "
                "the network has diverged, train it again"
            )
    return columns
