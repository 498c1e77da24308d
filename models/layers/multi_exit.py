"""A network with intermediate heads: any base module, small heads on its submodules' outputs, one policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .exit_policies import ExitPolicy, policy_named


@dataclass(frozen=True)
class HeadSpec:
    """Where a head reads and what it is; JSON-able, so that a checkpoint can rebuild the head.

    Attributes:
        at: module path inside the base whose output tensor the head reads.
        features: size of that output along the feature axis.
        pool: side of the adaptive average pool for 4-D outputs.
        axis: the feature axis; None is axis 1 of [N, C, H, W] and [N, C], the last axis of [N, T, C].
            Swin-like networks have maps [N, H, W, C] (axis 3), one-dimensional convolutions [N, C, T] (axis
            1).
        token: read this token of [N, T, C] alone (0: the class token) instead of the mean over all.
        mask: which input of the base, [N, T], says by non-zero values which tokens count in the mean of [N, T, C].
        hidden: width of a hidden layer with ReLU; 0: the head is linear.
    """

    at: str
    features: int
    pool: int = 1
    axis: int | None = None
    token: int | None = None
    mask: int | None = None
    hidden: int = 0


class ExitPool(nn.Module):
    """Averages ``[N, C, H, W] | [N, H, W, C] | [N, T, C] | [N, C, T] | [N, C]`` over the positions, or picks a token.

    The result is [N, features], or [N, features * pool * pool] of a map that is pooled to ``pool x pool``.
    """

    def __init__(self, spec: HeadSpec, dims: int) -> None:
        super().__init__()
        if dims not in (2, 3, 4):
            raise ValueError(f"the output of {spec.at!r} has {dims} axes; an exit reads 2, 3 or 4")
        self.dims = dims
        self.side = spec.pool if dims == 4 else 1
        self.axis = spec.axis if spec.axis is not None else (2 if dims == 3 else 1)
        if (spec.token is not None or spec.mask is not None) and (dims, self.axis) != (3, 2):
            raise ValueError(f"the output of {spec.at!r} is no sequence of tokens [N, T, C]: a head can only pool it")
        self.token = spec.token

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float [N, width]; `mask` [N, T] is non-zero where a token counts, a row without any has zeros."""
        if self.dims == 2:
            # a copy, because an in-place activation may follow and training needs the value; no ONNX node
            return x.clone()
        if self.token is not None:
            return x[:, self.token].clone()
        if mask is not None:
            weight = (mask != 0).to(x.dtype)
            weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
            return torch.bmm(weight[:, None, :], x)[:, 0]
        if self.side == 1:
            # the mean is the same as pooling to 1x1 and becomes one ONNX node
            return x.mean(dim=[a for a in range(1, self.dims) if a != self.axis])
        if self.axis == 3:
            x = x.permute(0, 3, 1, 2)
        return nn.functional.adaptive_avg_pool2d(x, self.side).flatten(1)


class ExitHead(nn.Module):
    """Pool, flatten, one linear layer (METHODS §2.1), or two with ReLU between: a feature to logits [N, classes]."""

    def __init__(self, spec: HeadSpec, classes: int, dims: int) -> None:
        super().__init__()
        self.pool = ExitPool(spec, dims)
        width = spec.features * self.pool.side**2
        self.hidden = nn.Linear(width, spec.hidden) if spec.hidden else None
        self.linear = nn.Linear(spec.hidden or width, classes)

    @property
    def layers(self) -> list[nn.Linear]:
        """The linear layers in order."""
        return [self.linear] if self.hidden is None else [self.hidden, self.linear]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one row."""
        return sum(layer.weight.numel() for layer in self.layers)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits float [N, classes] of pooled features [N, width]."""
        if self.hidden is not None:
            pooled = torch.relu(self.hidden(pooled))
        logits: Tensor = self.linear(pooled)
        return logits

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits float [N, classes]."""
        return self.classify(self.pool(x, mask))


class ExitOutput(NamedTuple):
    """What a network with exits answers."""

    label: Tensor
    """int64 [N]."""
    scores: Tensor
    """float32 [N, C], probabilities; excluded classes exactly 0; ``argmax(scores) == label``."""
    exit_index: Tensor
    """int64 [N], 0 ... K; K is the network's own end."""


class MultiExit(nn.Module):
    """`base` with K heads, thresholds float32 [K] and a policy.

    Heads read the outputs of named modules of the untouched base through forward hooks, so any module whose
    output is a tensor is a place for an exit, and the user's forward is not changed. `base` takes its
    inputs positionally and returns one logits tensor [N, C].

    State keys: ``base.<original name>``, ``heads.<i>.linear.*`` (and ``hidden.*``), ``thresholds``.
    """

    thresholds: Tensor

    def __init__(
        self, base: nn.Module, heads: Sequence[HeadSpec], dims: Sequence[int], classes: int, policy: str
    ) -> None:
        """Attaches fresh heads.

        Args:
            base: the network; kept, not copied.
            heads: in order of depth.
            dims: number of axes (2, 3 or 4) of each head's feature.
            classes: C.
            policy: a name in `exit_policies.POLICIES`.

        Raises:
            ValueError: a path that `base` does not have, or an unknown policy.
        """
        super().__init__()
        for spec in heads:
            try:
                base.get_submodule(spec.at)
            except AttributeError:
                raise ValueError(
                    f"no module {spec.at!r} to put an exit at; `edgewright cuts` lists the places"
                ) from None
        self.base = base
        self.specs = tuple(heads)
        self.classes = classes
        self.policy: ExitPolicy = policy_named(policy)
        self.heads = nn.ModuleList(ExitHead(s, classes, d) for s, d in zip(heads, dims, strict=True))
        self.register_buffer("thresholds", torch.full((len(heads),), self.policy.never, dtype=torch.float32))

    def head(self, index: int) -> ExitHead:
        """The head of exit `index`."""
        return cast(ExitHead, self.heads[index])

    def pooled(self, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """One pass of the base: every head's pooled feature [N, width], and the base's own logits [N, C].

        Raises:
            RuntimeError: a module with an exit did not run exactly once.
        """
        found: dict[int, Tensor] = {}

        def reader(index: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                if index in found:
                    at = self.specs[index].at
                    raise RuntimeError(f"module {at!r} runs more than once in forward, so no exit can sit there")
                # pooled here and not later: what follows may change the output in place, as `x += skip` does
                mask = self.specs[index].mask
                found[index] = self.head(index).pool(output, None if mask is None else inputs[mask])

            return hook

        handles = [self.base.get_submodule(s.at).register_forward_hook(reader(i)) for i, s in enumerate(self.specs)]
        try:
            last: Tensor = self.base(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [s.at for i, s in enumerate(self.specs) if i not in found]
        if missing:
            raise RuntimeError(f"module {missing[0]!r} did not run in forward, so an exit there has nothing to read")
        return [found[i] for i in range(len(self.specs))], last

    def all_logits(self, *inputs: Tensor) -> list[Tensor]:
        """Logits [N, C] of every head in order, the base's own last; one forward pass of the base."""
        features, last = self.pooled(*inputs)
        return [self.head(i).classify(x) for i, x in enumerate(features)] + [last]

    def forward(self, *inputs: Tensor) -> ExitOutput:
        """Runs everything and takes each row's first decided exit; the same in train and eval mode."""
        return self.decide(self.all_logits(*inputs))

    def decide(self, logits: Sequence[Tensor], thresholds: Tensor | None = None) -> ExitOutput:
        """Applies the policy to logits of all heads (K + 1 tensors [N, C]).

        Args:
            logits: as `all_logits` returns them.
            thresholds: float [K] to use in place of the module's own.
        """
        thresholds = self.thresholds if thresholds is None else thresholds
        excluded: Tensor | None = None
        exit_index = torch.full((logits[0].shape[0],), len(logits) - 1, dtype=torch.int64, device=logits[0].device)
        open_rows = torch.ones_like(exit_index, dtype=torch.bool)
        chosen: list[Tensor] = []
        for i, head_logits in enumerate(logits[:-1]):
            excluded, decided, scores = self.policy.decide(head_logits, thresholds[i], excluded)
            exit_index = torch.where(open_rows & decided, i, exit_index)
            open_rows = open_rows & ~decided
            chosen.append(scores)
        chosen.append(self.policy.finish(logits[-1], excluded))
        rows = torch.arange(exit_index.shape[0], device=exit_index.device)
        scores = torch.stack(chosen)[exit_index, rows]
        return ExitOutput(scores.argmax(dim=1), scores, exit_index)

    def margins(
        self, logits: Sequence[Tensor], thresholds: Tensor | None = None, shifts: Sequence[float] | None = None
    ) -> Tensor:
        """How far each row is from another answer, float32 [N], in units of a logit.

        While every logit of a row moves by less than this, neither its exit nor its label changes. So a
        label or exit that differs between two runtimes is explained by numeric error only where the largest
        difference of a logit is at least the margin. (Where float32 sigmoids or probabilities are
        themselves only a few bits apart the margin is of their relative precision, 1e-7: an allowance below
        1e-6 means nothing.) Rows with NaN have margin 0, rows that cannot flip the largest float.

        Args:
            logits: as for `decide`.
            thresholds: as for `decide`.
            shifts: K + 1 positive numbers, what the logits of each head may be off by. A distance at a head then
                counts as ``max(shifts) / shift`` times itself, so that a row is explained by numeric error where
                its margin is at most ``max(shifts)``, each decision on its way judged by the error of its own head.
        """
        thresholds = self.thresholds if thresholds is None else thresholds
        errors = torch.tensor([1.0] * len(logits) if shifts is None else list(shifts), dtype=torch.float64)
        weight = errors.max() / errors
        output = self.decide(logits, thresholds)
        top = output.scores.to(torch.float64).topk(min(2, output.scores.shape[1]), dim=1).values
        margin = (top[:, 0].log() - top[:, -1].log()) / 2 * weight[output.exit_index]
        excluded: Tensor | None = None
        for i, head_logits in enumerate(logits[:-1]):
            here = self.policy.margin(head_logits, thresholds[i], excluded) * weight[i]
            margin = torch.where(output.exit_index >= i, torch.minimum(margin, here), margin)
            excluded = self.policy.decide(head_logits, thresholds[i], excluded).excluded
        largest = torch.finfo(torch.float32).max
        return torch.nan_to_num(margin, nan=0.0, posinf=largest).clamp(0.0, largest).to(torch.float32)
