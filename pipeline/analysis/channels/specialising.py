"""A network for some of its classes: the outputs of the others go, before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.edge_runtime.errors import ExportError
from edgewright.export.graph.leaves import leaves_of

from ...errors import StageError
from . import surgery
from .equivalence import probe
from .finding import find_outputs
from .flow import OF_ONE_TENSOR, Columns
from .modes import plain_eval


@torch.no_grad()
def class_cut(
    model: nn.Module, inputs: tuple[Tensor, ...], classes: Sequence[int], columns: Columns = OF_ONE_TENSOR
) -> surgery.Keep:
    """The cut that leaves the logits of `classes`, proven by running: they are those of `model`.

    Args:
        model: returns logits [N, classes], or what `columns` says; unchanged.
        inputs: one row, positional.
        classes: indices of logits, ascending.
        columns: where the logits of the classes lie.

    Raises:
        StageError: the model returns no logits that can be told apart.
    """
    keep = find_outputs(model, inputs, columns).keep({"output": torch.tensor(list(classes))})
    lively = probe(model)
    stay = [*range(columns.first), *(columns.first + index for index in classes)]
    with plain_eval(lively), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = _answer(lively(*inputs), columns).index_select(columns.axis, torch.tensor(stay))
        torch.manual_seed(0)
        narrow = _answer(surgery.pruned(lively, keep)(*inputs), columns)
    if narrow.shape != whole.shape or not torch.allclose(
        narrow, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())
    ):
        raise StageError(
            f"the model cannot be specialised to some of its classes: without the outputs of the others it returns "
            f"{list(narrow.shape)} and not the same {len(classes)} logits. Something behind the last layer depends on "
            "their number or order: return the logits of the last layer as they are"
        )
    return keep


def class_columns(specs: Sequence[AnswerSpec]) -> Columns:
    """Where the logits of the classes lie in what a model with the answers `specs` returns.

    Raises:
        StageError: no answer has classes, or several have.
    """
    found = [spec for spec in specs if kind_of(spec).class_axis is not None]
    if len(found) != 1:
        raise StageError(
            f"{len(found)} of the model's answers ({', '.join(spec.kind for spec in specs)}) have a column for each "
            "class, and the model can be specialised where one has: leave `classes` out"
        )
    kind = kind_of(found[0])
    assert kind.class_axis is not None

    def logits(output: Any) -> Tensor | None:
        try:
            return leaves_of(output, found)[0]
        except ExportError:
            return None

    return Columns(kind.class_axis, logits, kind.first_class(found[0]))


def _answer(output: Any, columns: Columns) -> Tensor:
    answer = columns.of(output)
    assert answer is not None, "it was followed"
    return answer
