"""Rules that decide, row by row, whether a network with several heads may stop.

A policy is tensor algebra on ``[N, C]`` logits without any data-dependent control flow. The same functions
serve the threshold search (on cached logits, under `torch.vmap` over thresholds), `MultiExit.forward` and
the ONNX export, which captures them and places them in front of each `If`; so every operation here is one
that a device pays for at each exit.

The state that travels from one exit to the next is at most one bool tensor ``excluded [N, C]``. Rows never
influence each other. A row whose logits are all NaN is never decided and keeps its NaN to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """float32 [N, C], probabilities should the row leave here; excluded classes are exactly 0. The threshold acts on
    them through `excluded` alone (the search relies on it)."""


class ExitPolicy(Protocol):
    """The contract; implementations are in `POLICIES`. Thresholds lie between `never` and `always`."""

    name: ClassVar[str]
    never: ClassVar[float]
    """a threshold with which no row leaves; K of them make the plain network."""
    always: ClassVar[float]
    """a threshold with which every row leaves (rows whose two best classes tie exactly may stay)."""
    excludes: ClassVar[bool]
    """True if it rules classes out, which it then remembers from exit to exit."""
    classwise: ClassVar[bool]
    """True if it excludes and what it remembers of one class changes nothing for the others, if a class that one
    threshold excludes is excluded by all nearer to `always`, and if `decide` takes a threshold for every class as well,
    float32 [N, C]. The search relies on all three."""
    one_against_rest: ClassVar[bool]
    """True if it reads each logit through its own sigmoid, False if it reads their softmax: so heads are trained."""

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """Judges one exit.

        Args:
            logits: float [N, C], of this exit's head.
            threshold: float32 [], of this exit.
            excluded: bool [N, C] from the exit before; None at the first exit and for policies without
                memory.
        """
        ...

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Probabilities float32 [N, C] at the network's own end, for rows that no exit decided."""
        ...

    def margin(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Tensor:
        """float64 [N]: all logits of a row may move by less than this and `decided` and `excluded` stay.

        In units of a logit, infinity where nothing can flip. Arguments as for `decide`. It is measured as
        half the distance of two logarithms of probabilities (moving all logits by e moves such a distance
        by at most 2e), so it also shrinks where a sigmoid saturates and float32 tells two classes apart by
        a few bits only.
        """
        ...


class ClassExclusion:
    """An exit excludes the classes it is sure are wrong; the row leaves when one is left.

    METHODS §2.4, arXiv 2309.13443.
    With ``q = sigmoid(logits)`` a class stays while ``q > beta * max(q)``, ``0 <= beta <= 1``; ``beta = 0`` excludes
    nothing even where a sigmoid underflows to 0, and the favourite always stays. Exclusions are remembered from exit to
    exit; only the current favourite is readmitted. It is the class of the largest logit: beyond 17 float32 sigmoids are
    all 1, which the release takes for a tie and readmits the first of. Classes whose logits are equal are all
    readmitted, so such a row does not leave.
    """

    name: ClassVar[str] = "class_exclusion"
    never: ClassVar[float] = 0.0
    always: ClassVar[float] = 1.0
    excludes: ClassVar[bool] = True
    classwise: ClassVar[bool] = True
    one_against_rest: ClassVar[bool] = True

    def log_strength(self, logits: Tensor) -> Tensor:
        """Float64 [N, C]: logarithms of what is compared, up to a constant of the row."""
        return torch.nn.functional.logsigmoid(logits.to(torch.float64))

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; scores are 1 for the survivor.

        A class is out if it is behind the favourite, and out already or ``beta / q_c >= 1 / max(q)``.
        Compared are the reciprocals ``1 / q = 1 + exp(-z)``: runtimes compute a sigmoid with an absolute error only
        (ONNX Runtime's is off by 3e-3 of its value at a logit of -10, and 0 at -17), which a small ``beta`` would
        turn into wrong exclusions. They are equal where sigmoids saturate, so who is the favourite is read off the
        logits. Every operation here is one small node of the exported graph, so they are chosen by what those cost: a
        `where` is three times a maximum, and a logit that is read with the other sign alone costs no `Neg`, because the
        layer that makes it changes its sign (`splice`).
        """
        lack = -logits.to(torch.float32)
        behind = lack > lack.amin(dim=1, keepdim=True)
        distance = 1.0 + torch.exp(lack)
        weak = distance * threshold >= distance.amin(dim=1, keepdim=True)
        weak = behind & (weak if excluded is None else weak | excluded)
        out = weak.to(torch.float32)
        return Decision(weak, out.sum(dim=1) == logits.shape[1] - 1, 1.0 - out)

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Softmax over the classes that survived."""
        logits = logits.to(torch.float32)
        if excluded is not None:
            # the finite minimum: infinity would make NaN of every class that is not excluded
            logits = logits + excluded.to(torch.float32) * torch.finfo(torch.float32).min
        return torch.softmax(logits, dim=1)

    def margin(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Tensor:
        """See `ExitPolicy.margin`: the class closest to its line.

        The favourite stays whatever beta is, so it counts only where it comes back from exclusion: then the
        runner-up could take its place.
        """
        log_q, exact = self.log_strength(logits), logits.to(torch.float64)
        best = exact.topk(min(2, exact.shape[1]), dim=1)
        lead = best.values[:, 0] - best.values[:, -1]
        line = log_q.gather(1, best.indices[:, :1]) + threshold.to(torch.float64).log()
        distance = (log_q - line).abs()
        # what is out comes back only as the favourite, and logits say who that is
        alone = threshold >= self.always if excluded is None else excluded | (threshold >= self.always)
        distance = torch.where(alone, best.values[:, :1] - exact, distance)
        distance = distance.scatter(1, best.indices[:, :1], torch.inf).amin(dim=1)
        if excluded is not None and log_q.shape[1] > 1:
            returns = excluded.gather(1, best.indices[:, :1])[:, 0]
            distance = torch.where(returns, torch.minimum(distance, lead), distance)
        return distance / 2


class PermanentExclusion(ClassExclusion):
    """Class exclusion without readmission: what an exit has ruled out stays out (METHODS §2.4, ``readmit=False``).

    The favourite is the best of the classes that are left, so that never all of them are ruled out.
    """

    name: ClassVar[str] = "class_exclusion_permanent"
    classwise: ClassVar[bool] = False  # the favourite is the best of those that are left

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; scores are 1 for the survivor."""
        if excluded is None:
            return super().decide(logits, threshold, None)
        # the largest finite number: infinity times 0 would be NaN in the classes that are left
        lack = -logits.to(torch.float32) + excluded.to(torch.float32) * torch.finfo(torch.float32).max
        distance = 1.0 + torch.exp(lack)
        weak = distance * threshold >= distance.amin(dim=1, keepdim=True)
        weak = excluded | (weak & (lack > lack.amin(dim=1, keepdim=True)))
        out = weak.to(torch.float32)
        return Decision(weak, out.sum(dim=1) == logits.shape[1] - 1, 1.0 - out)

    def margin(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Tensor:
        """See `ExitPolicy.margin`: of the classes that are left, the one closest to its line."""
        if excluded is None:
            return super().margin(logits, threshold, None)
        log_q = self.log_strength(logits)
        exact = logits.to(torch.float64)
        best, index = exact.masked_fill(excluded, -torch.inf).max(dim=1, keepdim=True)
        line = log_q.gather(1, index) + threshold.to(torch.float64).log()
        distance = torch.where(threshold >= self.always, best - exact, (log_q - line).abs())
        distance = distance.masked_fill(excluded, torch.inf).scatter(1, index, torch.inf)
        # NaN logits can flip by anything
        return torch.where(log_q.isnan().any(dim=1), torch.nan, distance.amin(dim=1) / 2)


class SoftmaxExclusion(ClassExclusion):
    """Class exclusion on the softmax: a class stays while its probability is at least ``beta`` times the largest.

    Memory and readmission as in `ClassExclusion`, heads trained by cross entropy, as for the policies on probabilities:
    linear heads are right more often with it than with one binary cross entropy per class.
    """

    name: ClassVar[str] = "class_exclusion_softmax"
    one_against_rest: ClassVar[bool] = False

    def log_strength(self, logits: Tensor) -> Tensor:
        """Float64 [N, C]: the logits themselves."""
        return logits.to(torch.float64)

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; scores are 1 for the survivor.

        Compared are the ratios ``exp(z - max(z))`` of the probabilities to the largest. They are 1 for the favourite,
        so that 1 in place of beta keeps out what is out already and readmits the favourite.
        """
        logits = logits.to(torch.float32)
        ratio = torch.exp(logits - logits.amax(dim=1, keepdim=True))
        share = threshold if excluded is None else torch.maximum(excluded.to(torch.float32), threshold)
        weak = ratio < share
        out = weak.to(torch.float32)
        return Decision(weak, out.sum(dim=1) == logits.shape[1] - 1, 1.0 - out)


class _Softmax:
    """What the policies have in common that judge a softmax: no memory, and probabilities at the end."""

    excludes: ClassVar[bool] = False
    classwise: ClassVar[bool] = False
    one_against_rest: ClassVar[bool] = False

    def finish(self, logits: Tensor, excluded: Tensor | None) -> Tensor:
        """Softmax of the last head."""
        del excluded
        return torch.softmax(logits.to(torch.float32), dim=1)


class MaxProbability(_Softmax):
    """Leaves when the largest softmax probability exceeds the threshold (METHODS §2.7; arXiv 1810.07052)."""

    name: ClassVar[str] = "max_probability"
    never: ClassVar[float] = 1.0
    always: ClassVar[float] = 0.0

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; no memory."""
        del excluded
        scores = torch.softmax(logits.to(torch.float32), dim=1)
        return Decision(None, scores.amax(dim=1) > threshold, scores)

    def margin(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Tensor:
        """See `ExitPolicy.margin`: from the largest probability to the threshold."""
        del excluded
        top = torch.log_softmax(logits.to(torch.float64), dim=1).amax(dim=1)
        threshold = threshold.to(torch.float64)
        # no float32 softmax exceeds 1, and every one exceeds 0
        return torch.where((threshold > 0) & (threshold < 1), (top - threshold.log()).abs() / 2, torch.inf)


class Entropy(_Softmax):
    """Leaves when the entropy of the softmax is below the threshold (BranchyNet, arXiv 1709.01686).

    The entropy is divided by ``log(classes)``, so that a threshold means the same for any number of classes: 0 is a
    certain row, 1 a row that knows nothing.
    """

    name: ClassVar[str] = "entropy"
    never: ClassVar[float] = 0.0
    always: ClassVar[float] = 1.01
    """a little above the entropy of a row that knows nothing, which rounding may push over 1."""

    def decide(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Decision:
        """See `ExitPolicy.decide`; no memory."""
        del excluded
        logits = logits.to(torch.float32)
        scores = torch.softmax(logits, dim=1)
        entropy = (scores * torch.log_softmax(logits, dim=1)).sum(dim=1) * (-1.0 / math.log(logits.shape[1]))
        return Decision(None, entropy < threshold, scores)

    def margin(self, logits: Tensor, threshold: Tensor, excluded: Tensor | None) -> Tensor:
        """See `ExitPolicy.margin`: the entropy's distance over the fastest it can change.

        All logits moving by e change it by at most e times the mean deviation of the log probabilities, whose
        square is at most ``log(C - 1)^2 / 4 + 1`` (the largest variance of a surprisal, arXiv 1304.0036).
        """
        del excluded
        classes = logits.shape[1]
        log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        line = threshold.to(torch.float64) * math.log(classes)
        fastest = math.sqrt(math.log(max(classes - 1, 1)) ** 2 / 4 + 1)
        return torch.where(threshold > self.never, (entropy - line).abs() / fastest, torch.inf)


POLICIES: dict[str, Callable[[], ExitPolicy]] = {
    policy.name: policy for policy in (ClassExclusion, PermanentExclusion, SoftmaxExclusion, MaxProbability, Entropy)
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
