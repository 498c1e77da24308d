"""Running a model over a split, and judging it by the task's metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.export.graph.leaves import ONE_TENSOR
from edgewright.export.source import answers_of
from edgewright.models.layers.multi_exit import ExitOutput

from ..metric import Answer, Score
from ..task import Split, SplitName, Task, batches, named_outputs, split_of


@torch.no_grad()
def answers(
    model: nn.Module,
    split: Split,
    device: torch.device | None = None,
    size: int = 256,
    specs: Sequence[AnswerSpec] = ONE_TENSOR,
) -> Iterator[Answer]:
    """Output of `model` and targets, batch by batch, on the CPU.

    Args:
        model: put into eval mode and moved to `device`, where it stays.
        split: read in order.
        device: where to compute, default the CPU.
        size: rows per batch; fewer where the split has a `largest_batch`, because its outputs are large.
        specs: where the answers lie in what the model returns, see `export.source.answers_of`.
    """
    device = torch.device("cpu") if device is None else device
    model = model.to(device).eval()
    for batch in batches(split, min(size, getattr(split, "largest_batch", size))):
        output = model(*batch.to(device).inputs)
        if isinstance(output, ExitOutput):
            yield Answer(ExitOutput(*(x.cpu() for x in output)), batch.targets)
            continue
        found = named_outputs(output, specs)
        on_cpu = found.cpu() if len(specs) == 1 else {name: tensor.cpu() for name, tensor in found.items()}
        yield Answer(on_cpu, batch.targets)


def evaluate(model: nn.Module, task: Task, split: SplitName, device: torch.device | None = None) -> Score:
    """Quality of `model` on a split of `task`, exits taken as the policy decides.

    Raises:
        DataError: the task has no such split.
    """
    found = answers(model, split_of(task, split, needed_by="evaluation"), device, specs=answers_of(task))
    return task.metric.score(found)
