"""A network for some of its classes: the outputs of the others go, before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import StageError
from . import surgery
from .equivalence import probe
from .finding import find_outputs
from .modes import plain_eval


@torch.no_grad()
def class_cut(model: nn.Module, inputs: tuple[Tensor, ...], classes: Sequence[int]) -> surgery.Keep:
    """The cut that leaves the logits of `classes`, proven by running: they are those of `model`.

    Args:
        model: returns logits [N, classes]; unchanged.
        inputs: one row, positional.
        classes: indices of logits, ascending.

    Raises:
        StageError: the model returns no logits that can be told apart.
    """
    keep = find_outputs(model, inputs).keep({"output": torch.tensor(list(classes))})
    lively = probe(model)
    with plain_eval(lively), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = lively(*inputs)[:, list(classes)]
        torch.manual_seed(0)
        narrow = surgery.pruned(lively, keep)(*inputs)
    if narrow.shape != whole.shape or not torch.allclose(
        narrow, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())
    ):
        raise StageError(
            f"the model cannot be specialised to some of its classes: without the outputs of the others it returns "
            f"{list(narrow.shape)} and not the same {len(classes)} logits. Something behind the last layer depends on "
            "their number or order: return the logits of the last layer as they are"
        )
    return keep
