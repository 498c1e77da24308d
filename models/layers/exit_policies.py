"""Rules that decide, row by row, whether a network with several heads may stop.

A policy is tensor algebra on ``[N, C]`` logits without any data-dependent control flow. The same functions serve
the threshold search (on cached logits), `MultiExit.forward` and the ONNX export, which captures them and places
them in front of each `If`; so every operation here is one that a device pays for at each exit.

The state that travels from one exit to the next is at most one bool tensor ``excluded [N, C]``. Rows never influence each
other. A row with NaN logits is never decided and keeps its NaN to the end.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


class Decision(NamedTuple):
    """What a policy says after one exit."""

    excluded: Tensor | None
    """bool [N, C], classes ruled out so far, handed to the next exit; None for a policy without memory."""
    decided: Tensor
    """bool [N], the row may leave here."""
    scores: Tensor
    """float32 [N, C], probabilities should the row leave here; excluded classes are exactly 0."""


class ExitPolicy(Protocol):
    """The contract; implementations are registered in `POLICIES`."""

    name: ClassVar[str]
    never: ClassVar[float]
    """a threshold with which no row leaves; K of them make the plain network."""
    always: ClassVar[float]
    """a threshold with which every row leaves (rows whose two best classes tie exactly may stay)."""

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """Judges one exit.

        Args:
            logits: float [N, C], of this exit's head.
            threshold: float [], of this exit.
            excluded: bool [N, C] from the exit before; None at the first exit and for policies without memory.
        """
        ...

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Probabilities float32 [N, C] at the network's own end, for rows that no exit decided."""
        ...

    def margin(self, logits: Tensor, threshold: Tensor) -> Tensor:
        """Distance float [N] of the closest comparison of this exit to flipping; what numeric error must stay below."""
        ...


class ClassExclusion:
    """An exit excludes the classes it is sure are wrong; the row leaves when one is left (METHODS §2.4, arXiv 2309.13443).

    With ``q = sigmoid(logits)`` a class stays while ``q >= beta * max(q)``; the current favourite is readmitted.
    Exclusions are remembered from exit to exit. The comparison is ``>=`` where the release has ``>``, so that
    ``beta = 0`` excludes nothing even where a sigmoid underflows to 0; for ``0 < beta < 1`` the two differ only on
    exact equality. Classes that tie exactly for favourite are all readmitted, so such a row does not leave.
    """

    name: ClassVar[str] = "class_exclusion"
    never: ClassVar[float] = 0.0
    always: ClassVar[float] = 1.0

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; scores are 1 for the survivor."""
        q = torch.sigmoid(logits)
        favourite = q.amax(dim=1, keepdim=True)
        weak = q < threshold * favourite
        if excluded is not None:
            weak = (weak | excluded) & (q < favourite)
        alive = torch.logical_not(weak).to(torch.float32)
        return Decision(weak, alive.sum(dim=1) == 1.0, alive)

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Softmax over the classes that survived."""
        if excluded is None:
            return torch.softmax(logits.to(torch.float32), dim=1)
        # masked_fill with the finite minimum: infinity would make NaN of a fully excluded row under some runtimes
        kept = torch.where(excluded, torch.finfo(torch.float32).min, logits.to(torch.float32))
        return torch.softmax(kept, dim=1)

    def margin(self, logits: Tensor, threshold: Tensor) -> Tensor:
        """Closest of: any class to the line ``beta * max``, and the runner-up to the favourite."""
        q = torch.sigmoid(logits)
        top = q.topk(min(2, q.shape[1]), dim=1).values
        line = (q - threshold * top[:, :1]).abs().amin(dim=1)
        return torch.minimum(line, top[:, 0] - top[:, -1]) if q.shape[1] > 1 else line


class MaxProbability:
    """Leaves when the largest softmax probability exceeds the threshold (METHODS §2.7; SDN, arXiv 1810.07052)."""

    name: ClassVar[str] = "max_probability"
    never: ClassVar[float] = 1.0
    always: ClassVar[float] = 0.0

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; no memory."""
        del excluded
        scores = torch.softmax(logits.to(torch.float32), dim=1)
        return Decision(None, scores.amax(dim=1) > threshold, scores)

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Softmax of the last head."""
        del excluded
        return torch.softmax(logits.to(torch.float32), dim=1)

    def margin(self, logits: Tensor, threshold: Tensor) -> Tensor:
        """Distance of the largest probability to the threshold, or to the runner-up if that is closer."""
        p = torch.softmax(logits.to(torch.float32), dim=1)
        top = p.topk(min(2, p.shape[1]), dim=1).values
        line = (top[:, 0] - threshold).abs()
        return torch.minimum(line, top[:, 0] - top[:, -1]) if p.shape[1] > 1 else line


POLICIES: dict[str, type[ClassExclusion] | type[MaxProbability]] = {
    policy.name: policy for policy in (ClassExclusion, MaxProbability)
}
"""Every policy by name; MultiExit, the search and the export look here and nowhere else."""


def policy_named(name: str) -> ExitPolicy:
    """The policy called `name`.

    Raises:
        ValueError: there is none, with the names that exist.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown exit policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
