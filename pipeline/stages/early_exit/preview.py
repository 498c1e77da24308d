"""Where exits could sit in a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...analysis import cost
from ...analysis.channels.modes import plain_eval
from ...errors import StageError
from ...stage import Preview
from ...task import Task
from .config import DEFAULT_SHARES, EarlyExitConfig
from .placement import LATEST, Place, choose_places, places


def preview(model: nn.Module, inputs: tuple[Tensor, ...], task: Task | None, config: EarlyExitConfig) -> Preview:
    """Places for exits with the MACs up to there, one of those at the same cost, and which a recipe takes.

    Args:
        model: unchanged.
        inputs: rows; the first is used.
        task: not needed.
        config: see there.

    Raises:
        RecipeError: a place that does not exist.
        StageError: the model returns no logits [N, C], or no exit can sit at a place that is named.
    """
    del task
    row = tuple(x[:1] for x in inputs)
    with torch.no_grad(), plain_eval(model):
        output = model(*row)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise StageError("exits decide between classes of a row, and the model returns no logits [N, C]")
    total = cost.count(model, row).macs
    found = [place for place in places(model, row).values() if 0 < place.macs <= LATEST * total]
    outermost: dict[int, Place] = {}
    for place in sorted(found, key=lambda place: (place.macs, place.path.count("."), -place.order)):
        outermost.setdefault(place.macs, place)
    figures = {"places": len(outermost), "macs": total}
    if not found:
        return Preview(
            "no exit can sit anywhere: no module returns one float tensor with 2 to 4 axes, batch first, between the "
            "first and the last layer with weights",
            figures=figures,
        )
    chosen = [] if config.auto else choose_places(model, row, config.at, config.at_macs or DEFAULT_SHARES)
    taken = {place.path for place in chosen}
    listed = sorted({p.path: p for p in (*outermost.values(), *chosen)}.values(), key=lambda place: place.order)
    takes = {
        place.path: f"{place.macs / total:.1%} of the MACs, {'x'.join(map(str, place.shape[1:]))}"
        + (", an exit" if place.path in taken else "")
        for place in listed
    }
    where = (
        f"at most {config.auto} exits, tried between all blocks"
        if config.auto
        else f"{len(chosen)} exit(s) at {', '.join(place.path for place in chosen)}"
    )
    return Preview(f"{len(outermost)} places for exits; {where}", takes, figures=figures)
