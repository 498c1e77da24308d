"""A network with intermediate heads: any base module, linear heads on the outputs of its submodules, one policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .exit_policies import ExitPolicy, policy_named


@dataclass(frozen=True)
class HeadSpec:
    """Where a head reads and what it is; JSON-able, so that a checkpoint can rebuild the head.

    Attributes:
        at: module path inside the base whose output tensor the head reads.
        features: channels of that output: axis 1 of [N, C, H, W] and [N, C], the last axis of [N, T, C].
        pool: side of the adaptive average pool for 4-D outputs.
    """

    at: str
    features: int
    pool: int = 1


class ExitHead(nn.Module):
    """Pool, flatten, one linear layer: ``[N, C, H, W] | [N, T, C] | [N, C] -> [N, classes]`` (METHODS §2.1)."""

    def __init__(self, spec: HeadSpec, classes: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.pool = spec.pool
        self.linear = nn.Linear(spec.features * (spec.pool**2 if dims == 4 else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits float [N, classes]."""
        if self.dims == 4:
            # the mean is the same as pooling to 1x1 and becomes one ONNX node
            x = x.mean(dim=(2, 3)) if self.pool == 1 else nn.functional.adaptive_avg_pool2d(x, self.pool).flatten(1)
        elif self.dims == 3:
            x = x.mean(dim=1)
        logits: Tensor = self.linear(x)
        return logits


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

    Heads read the outputs of named modules of the untouched base through forward hooks, so any module whose output
    is a tensor is a place for an exit, and the user's forward is not changed. `base` takes its inputs positionally
    and returns one logits tensor [N, C].

    State keys: ``base.<original name>``, ``heads.<i>.linear.*``, ``thresholds``.
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
        modules = dict(base.named_modules())
        for spec in heads:
            if spec.at not in modules:
                raise ValueError(f"no module {spec.at!r} to put an exit at; `edgewright cuts` lists the places")
        self.base = base
        self.specs = tuple(heads)
        self.classes = classes
        self.policy: ExitPolicy = policy_named(policy)
        self.heads = nn.ModuleList(ExitHead(s, classes, d) for s, d in zip(heads, dims, strict=True))
        self.register_buffer("thresholds", torch.full((len(heads),), self.policy.never))

    def all_logits(self, *inputs: Tensor) -> list[Tensor]:
        """Logits [N, C] of every head in order, the base's own last; one forward pass of the base."""
        features: dict[str, Tensor] = {}

        def keep(path: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                features[path] = output

            return hook

        handles = [self.base.get_submodule(s.at).register_forward_hook(keep(s.at)) for s in self.specs]
        try:
            last: Tensor = self.base(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [s.at for s in self.specs if s.at not in features]
        if missing:
            raise RuntimeError(f"module {missing[0]!r} did not run in forward, so the exit there has nothing to read")
        return [head(features[s.at]) for head, s in zip(self.heads, self.specs, strict=True)] + [last]

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

    def margins(self, logits: Sequence[Tensor], thresholds: Tensor | None = None) -> Tensor:
        """Float [N]: the smallest distance of a comparison on each row's path to flipping (see `ExitPolicy.margin`)."""
        thresholds = self.thresholds if thresholds is None else thresholds
        output = self.decide(logits, thresholds)
        top = output.scores.topk(min(2, self.classes), dim=1).values
        margin = top[:, 0] - top[:, -1] if self.classes > 1 else top[:, 0]
        for i, head_logits in enumerate(logits[:-1]):
            passed = output.exit_index >= i
            margin = torch.where(passed, torch.minimum(margin, self.policy.margin(head_logits, thresholds[i])), margin)
        return margin
