"""The task of giving each row a vector: near for what belongs together, or as another encoder gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.embedding import EMBEDDING
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, Preprocessing

from ..errors import DataError
from ..metric import Metric
from ..task import Batch, Split, SplitName
from .array_task import Array, ArraySplit, ArrayTask, Augmentation, dealt
from .embedding_metrics import COSINE, RECALL, SPEARMAN, check_vectors, metric_of
from .splitting import stratified_split

_OUTPUT = "embedding"


class Embedding(ArrayTask):
    """A vector for each row, [N, D]. What the targets are says how it is learned and judged:

    * int64 [N], a group for each row: rows of a group belong together (two for a pair, all of a label). Contrastive
      loss, a softmax over the other rows of the batch; metric ``recall@K``, the share of rows with one of their group
      among the K nearest of the split.
    * float32 [N, 2], the number of a pair and its score, -1 to 1: the cosine of the two rows is fitted to the score;
      metric ``spearman``, the rank correlation of cosines and scores.
    * float32 [N, D] with `taught`: the vectors of another encoder, where nothing is labelled. The loss is one minus the
      cosine; metric ``cosine``, its mean.

    Training batches get, for each row that stands alone in them, one that belongs to it. Rows have no classes here, so
    criteria of pruning that need them do not apply: a batch of one class has nothing to tell it from.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays.
        taught: the targets are vectors.
        metric: ``recall@K``, default ``recall@1`` for groups, ``spearman`` for scores, ``cosine`` for vectors; or your
            own.
        temperature: of the softmax over cosines.
        preprocessing: how raw images become inputs on the device.
        augment: ``(batch, generator) -> batch``, for training batches only.
        name: for reports.
        input_name: name of the ONNX input; of several inputs their names, in the order of the model's forward.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split or metric, targets of another form, or a split in which nothing belongs
            together.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        *,
        taught: bool = False,
        metric: str | Metric | None = None,
        temperature: float = 0.1,
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "embedding",
        input_name: str | Sequence[str] = "x",
        provenance: Mapping[str, Any] | None = None,
        file_digests: Mapping[Path, str] | None = None,
    ) -> None:
        super().__init__(
            splits,
            preprocessing=preprocessing,
            augment=augment,
            name=name,
            input_name=input_name,
            provenance=provenance,
            file_digests=file_digests,
        )
        if not temperature > 0.0:
            raise DataError(f"temperature is {temperature}: give a positive number, 0.1 say")
        self._taught, self._temperature = taught, temperature
        forms = {key: _form(key, split.targets, taught) for key, split in self._splits.items()}
        if len(set(forms.values())) > 1:
            raise DataError(f"the splits have targets of several forms, {forms}: give all of them one")
        form = next(iter(forms.values()), RECALL)
        self._metric = metric if metric is not None and not isinstance(metric, str) else metric_of(metric, form)
        self._members = _members(self._splits["train"].targets) if "train" in self._splits and not taught else {}

    @classmethod
    def from_labels(
        cls,
        inputs: Array | Sequence[Array],
        labels: Array,
        *,
        apart: bool = False,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Embedding:
        """Splits labelled rows into the four splits, equal inputs kept together.

        Args:
            inputs: [len, ...]; a list or tuple of them for a model with several inputs.
            labels: int [len], rows of one label belong together.
            apart: deal out whole labels, so that the test is about labels that were not trained on.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class.
        """
        wanted = torch.as_tensor(labels).to(torch.int64)
        xs = [torch.as_tensor(x) for x in (inputs if isinstance(inputs, list | tuple) else [inputs])]
        if apart:
            return cls(_by_group(xs, wanted, wanted, fractions, seed), **options)
        names, classes = torch.unique(wanted, return_inverse=True)
        digests = ArraySplit(xs, wanted).sample_digests
        rows = stratified_split(digests, classes, [str(name) for name in names.tolist()], fractions, seed)
        return cls({key: ([x[at] for x in xs], wanted[at]) for key, at in rows.items()}, **options)

    @classmethod
    def from_pairs(
        cls,
        first: Array | Sequence[Array],
        second: Array | Sequence[Array],
        scores: Array | None = None,
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Embedding:
        """Deals pairs out to the four splits; pairs that share an equal row go together.

        Args:
            first: [pairs, ...]; a list or tuple of them for a model with several inputs.
            second: of the same shapes; row i belongs to row i of `first`.
            scores: float [pairs], how much each two are alike, -1 to 1; None: all belong together, and so do rows that
                a chain of pairs connects.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class, or another number of rows on either side.
        """
        sides = [
            [torch.as_tensor(x) for x in (side if isinstance(side, list | tuple) else [side])]
            for side in (first, second)
        ]
        pairs = len(sides[0][0])
        if any(len(x) != pairs for side in sides for x in side):
            raise DataError(f"the two sides have {pairs} and {len(sides[1][0])} rows: row i of one belongs to row i")
        both = [torch.stack([a, b], dim=1).flatten(0, 1) for a, b in zip(*sides, strict=True)]
        groups = _connected(ArraySplit(both, torch.zeros(2 * pairs)).sample_digests)
        if scores is not None:
            numbers = torch.arange(pairs, dtype=torch.float32)
            targets = torch.stack([numbers, torch.as_tensor(scores).to(torch.float32)], dim=1).repeat_interleave(2, 0)
            return cls(_by_group(both, targets, groups, fractions, seed), **options)
        kept = torch.tensor(_first_of_each(ArraySplit(both, groups).sample_digests))
        return cls(_by_group([x[kept] for x in both], groups[kept], groups[kept], fractions, seed), **options)

    @classmethod
    def from_encoder(
        cls,
        encoder: nn.Module,
        inputs: Array | Sequence[Array],
        *,
        fractions: Mapping[SplitName, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Embedding:
        """Rows without a label, whose targets are what `encoder` makes of them: it is distilled.

        Args:
            encoder: gives a vector [N, D] for each row; run once, in eval mode.
            inputs: [len, ...]; a list or tuple of them for a model with several inputs.
            fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
            seed: of the shuffle.
            options: as for the class.

        Raises:
            DataError: as for the class, or the encoder gives something else.
        """
        xs = [torch.as_tensor(x) for x in (inputs if isinstance(inputs, list | tuple) else [inputs])]
        return cls(dealt(xs, vectors_of(encoder, xs), fractions, seed), taught=True, **options)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: the vector."""
        return (AnswerSpec(_OUTPUT, EMBEDDING),)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Adds what belongs to rows that stand alone, then varies as it was asked to."""
        return super().augment(self._with_partners(batch, generator) if self._members else batch, generator)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """See the class; 0 where no two rows of the batch belong together.

        Raises:
            DataError: the output is not [N, D], or as wide as vectors that are targets.
        """
        check_vectors(output, targets if self._taught else None)
        if self._taught:
            return (1.0 - nn.functional.cosine_similarity(output, targets, dim=1)).mean()
        unit = nn.functional.normalize(output, dim=1)
        cosine = unit @ unit.T
        group = targets if targets.dim() == 1 else targets[:, 0]
        own = torch.eye(len(group), dtype=torch.bool, device=group.device)
        together = (group[:, None] == group[None, :]) & ~own
        if not together.any():
            return 0.0 * output.sum()
        if targets.dim() == 2:
            return (cosine - targets[:, 1:]).square()[together].mean()
        # the lowest finite number in place of minus infinity, which times 0 is NaN
        scores = (cosine / self._temperature).masked_fill(own, torch.finfo(cosine.dtype).min)
        likely = scores.log_softmax(dim=1).masked_fill(~together, 0.0)
        count = together.sum(dim=1)
        return -(likely.sum(dim=1)[count > 0] / count[count > 0]).mean()

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric

    def _with_partners(self, batch: Batch, generator: torch.Generator) -> Batch:
        groups = batch.targets if batch.targets.dim() == 1 else batch.targets[:, 0]
        _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        candidates: list[tuple[int, int]] = []
        for row in torch.nonzero(counts[inverse] == 1).flatten().tolist():
            members = self._members.get(float(groups[row]), [])
            # one of two different ones is not the row itself
            chosen = torch.randperm(len(members), generator=generator)[:2].tolist()
            candidates += [(row, members[at]) for at in chosen]
        if not candidates:
            return batch
        more = self._splits["train"].batch([index for _, index in candidates])
        kept: dict[int, int] = {}
        for at, (row, _) in enumerate(candidates):
            if row not in kept and any(
                not torch.equal(a[row], b[at]) for a, b in zip(batch.inputs, more.inputs, strict=True)
            ):
                kept[row] = at
        rows = torch.tensor(list(kept.values()), dtype=torch.int64)
        inputs = tuple(torch.cat([a, b[rows]]) for a, b in zip(batch.inputs, more.inputs, strict=True))
        return Batch(inputs, torch.cat([batch.targets, more.targets[rows]]))


@torch.no_grad()
def vectors_of(encoder: nn.Module, inputs: Sequence[Tensor], rows: int = 64) -> Tensor:
    """What `encoder` makes of each row, float32 [len, D]; in eval mode, `rows` at once.

    Raises:
        DataError: it gives no vector for a row.
    """
    encoder = encoder.eval()
    parts = []
    for at in torch.split(torch.arange(len(inputs[0])), rows):
        found = encoder(*(x[at] for x in inputs))
        check_vectors(found, None)
        parts.append(found.float())
    return torch.cat(parts)


def _form(split: SplitName, targets: Tensor, taught: bool) -> str:
    """The metric that targets of this form have.

    Raises:
        DataError: they have none of the forms, or nothing in them belongs together.
    """
    if taught:
        if targets.dim() != 2 or targets.dtype != torch.float32:
            raise DataError(
                f"split {split!r} has targets {targets.dtype} {list(targets.shape)}: vectors are float32 [N, D]"
            )
        if (targets == 0).all(dim=1).any():
            raise DataError(f"split {split!r} has a vector of zeros to learn, which has no direction")
        return COSINE
    scored = targets.dim() == 2 and targets.shape[1] == 2 and targets.dtype == torch.float32
    if not scored and (targets.dim() != 1 or targets.dtype != torch.int64):
        raise DataError(
            f"split {split!r} has targets {targets.dtype} {list(targets.shape)}: the group of a row is int64 [N], a "
            "pair and its score float32 [N, 2], and vectors of an encoder need taught=True"
        )
    _, counts = torch.unique(targets[:, 0] if scored else targets, return_counts=True)
    if scored and (counts != 2).any():
        raise DataError(f"split {split!r} has a pair of {int(counts[counts != 2][0])} rows: a scored pair has two")
    if scored and (targets[:, 1].abs() > 1).any():
        worst = float(targets[targets[:, 1].abs() > 1, 1][0])
        raise DataError(f"split {split!r} has the score {worst:g}: cosines are fitted to it, scale scores to -1 ... 1")
    if not (counts > 1).any():
        raise DataError(
            f"no two rows of the split {split!r} belong together: its quality cannot be told, add rows of one group"
        )
    return SPEARMAN if scored else RECALL


def _members(targets: Tensor) -> dict[float, list[int]]:
    """Group -> rows of it."""
    found: dict[float, list[int]] = {}
    for row, group in enumerate((targets if targets.dim() == 1 else targets[:, 0]).tolist()):
        found.setdefault(float(group), []).append(row)
    return found


def _by_group(
    inputs: Sequence[Tensor], targets: Tensor, groups: Tensor, fractions: Mapping[SplitName, float] | None, seed: int
) -> dict[SplitName, tuple[list[Tensor], Tensor]]:
    """Deals whole groups out to the splits."""
    digests = ArraySplit(inputs, targets).sample_digests
    first: dict[int, bytes] = {}
    for row, group in enumerate(groups.tolist()):
        first[group] = min(first.get(group, digests[row]), digests[row])
    of_group = [first[group] for group in groups.tolist()]
    rows = stratified_split(of_group, torch.zeros(len(groups), dtype=torch.int64), ("all",), fractions, seed)
    return {key: ([x[at] for x in inputs], targets[at]) for key, at in rows.items() if at}


def _connected(digests: Sequence[bytes]) -> Tensor:
    """A number for each row, int64: the same for rows 2i and 2i + 1, and for equal rows."""
    parent: dict[bytes, bytes] = {}

    def root(digest: bytes) -> bytes:
        while parent.setdefault(digest, digest) != digest:
            parent[digest] = digest = parent[parent[digest]]
        return digest

    for first, second in zip(digests[::2], digests[1::2], strict=True):
        parent[root(second)] = root(first)
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(root(digest), len(numbers)) for digest in digests], dtype=torch.int64)


def _first_of_each(digests: Sequence[bytes]) -> list[int]:
    found: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        found.setdefault(digest, row)
    return list(found.values())
