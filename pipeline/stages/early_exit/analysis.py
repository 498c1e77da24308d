"""Who leaves where, how right they are, and how many classes are still possible: the exit-aware part of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgewright.models.layers.multi_exit import MultiExit

from ...task import Split, batches


@dataclass(frozen=True)
class ExitAnalysis:
    """Measured on one split; K exits and the network's end, C classes. JSON-able with `dataclasses.asdict`.

    Attributes:
        rows: rows leaving at each exit [K + 1].
        accuracy: of the rows that leave there, None where nobody does.
        per_class: rows of each class leaving at each exit [C][K + 1].
        right_per_class: how many of them are right [C][K + 1].
        mean_depth: mean exit index of each class, None for a class without rows.
        survivors: of the rows that reach an exit, how many have n classes left after it [K][C + 1]; empty for a policy
            without memory of classes.
        wrong_exclusions: share of the rows that reach an exit whose true class has been excluded after it [K].
        wrong_exclusion_rate: share of all rows that end with their true class excluded; None without memory of classes.
        head_accuracy: of every head alone on all rows [K + 1].
        confusions: (true class, answer, rows, of these right at the network's own end) of rows that end with their true
            class excluded, most frequent first.
        lost: rows that are wrong although the network's own end is right.
        won: rows that are right although the network's own end is wrong.
    """

    rows: tuple[int, ...]
    accuracy: tuple[float | None, ...]
    per_class: tuple[tuple[int, ...], ...]
    right_per_class: tuple[tuple[int, ...], ...]
    mean_depth: tuple[float | None, ...]
    survivors: tuple[tuple[int, ...], ...]
    wrong_exclusions: tuple[float, ...]
    wrong_exclusion_rate: float | None
    head_accuracy: tuple[float, ...]
    confusions: tuple[tuple[int, int, int, int], ...]
    lost: int
    won: int


@torch.no_grad()
def analyse_exits(model: MultiExit, split: Split, size: int = 256) -> ExitAnalysis:
    """Runs `model` once over `split` and counts.

    Args:
        model: on the CPU, eval mode.
        split: labelled rows.
        size: rows per batch.
    """
    logits: list[list[Tensor]] = [model.all_logits(*batch.inputs) for batch in batches(split, size)]
    return analyse_logits(model, [torch.cat(parts) for parts in zip(*logits, strict=True)], split.targets)


def analyse_logits(model: MultiExit, heads: Sequence[Tensor], targets: Tensor) -> ExitAnalysis:
    """The same from cached logits.

    Args:
        model: gives policy and thresholds.
        heads: K + 1 tensors float [N, C].
        targets: int64 [N].
    """
    output = model.decide(heads)
    exits = len(heads)
    right = output.label == targets
    rows = torch.bincount(output.exit_index, minlength=exits)
    accuracy = tuple(float(right[output.exit_index == k].float().mean()) if rows[k] else None for k in range(exits))
    table = torch.zeros(model.classes, exits, dtype=torch.int64)
    table.index_put_((targets, output.exit_index), torch.ones_like(targets), accumulate=True)
    hits = torch.zeros_like(table).index_put_((targets, output.exit_index), right.to(torch.int64), accumulate=True)
    own = heads[-1].argmax(dim=1) == targets
    depth = tuple(float((row * torch.arange(exits)).sum() / row.sum()) if row.sum() else None for row in table)
    survivors, wrong, excluded = _exclusions(model, heads, targets, output.exit_index)
    return ExitAnalysis(
        rows=tuple(rows.tolist()),
        accuracy=accuracy,
        per_class=tuple(tuple(row.tolist()) for row in table),
        right_per_class=tuple(tuple(row.tolist()) for row in hits),
        mean_depth=depth,
        survivors=survivors,
        wrong_exclusions=wrong,
        wrong_exclusion_rate=None if excluded is None else float(excluded.float().mean()),
        head_accuracy=tuple(float((h.argmax(dim=1) == targets).float().mean()) for h in heads),
        confusions=() if excluded is None else _confusions(targets, output.label, excluded, own),
        lost=int((own & ~right).sum()),
        won=int((right & ~own).sum()),
    )


def _confusions(
    targets: Tensor, labels: Tensor, excluded: Tensor, own: Tensor
) -> tuple[tuple[int, int, int, int], ...]:
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    for true, label, right in zip(*(x[excluded].tolist() for x in (targets, labels, own)), strict=True):
        rows, known = pairs.get((true, label), (0, 0))
        pairs[true, label] = rows + 1, known + int(right)
    found = [(*pair, *counts) for pair, counts in pairs.items()]
    return tuple(sorted(found, key=lambda row: (-row[2], row[:2])))


def _exclusions(
    model: MultiExit, heads: Sequence[Tensor], targets: Tensor, exit_index: Tensor
) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...], Tensor | None]:
    """Survivors and wrong exclusions after each exit, of the rows that reach it; whose class is out at the end [N]."""
    excluded: Tensor | None = None
    survivors: list[tuple[int, ...]] = []
    shares: list[float] = []
    wrong = torch.zeros_like(targets, dtype=torch.bool)
    for k, logits in enumerate(heads[:-1]):
        excluded = model.policy.decide(logits, model.thresholds[k], excluded).excluded
        if excluded is None:
            return (), (), None
        reached = exit_index >= k
        alive = (~excluded[reached]).sum(dim=1)
        survivors.append(tuple(torch.bincount(alive, minlength=model.classes + 1).tolist()))
        gone = excluded.gather(1, targets[:, None])[:, 0]
        shares.append(float(gone[reached].float().mean()) if reached.any() else 0.0)
        # the last exit that a row passes has the last word on it
        wrong = torch.where(reached, gone, wrong)
    return tuple(survivors), tuple(shares), wrong
