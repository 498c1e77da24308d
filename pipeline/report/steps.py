"""One row per step of a run: how good the model is and what it costs (METHODS §0.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.export.source import answers_of
from edgewright.models.layers.multi_exit import ExitOutput, MultiExit

from ..analysis import cost
from ..metric import Answer
from ..stage import Json
from ..task import Split, Task, split_of
from ..training.evaluation import answers, evaluate


@dataclass(frozen=True)
class StepRow:
    """A step of the pipeline as the report shows it; JSON-able with `dataclasses.asdict`.

    Attributes:
        step: the id, unique in a run.
        stage: the stage, ``"base"`` for the model before all stages.
        metric: name of the task's metric.
        quality: the metric on the test split, exits taken as the policy decides.
        validation_quality: None without a validation split.
        accuracy: on the test split; None for a task whose rows are not right or wrong, as all that follows.
        worst_class_accuracy: on the test split, the lowest accuracy of a class that has samples.
        per_class: accuracy of every class on the test split, None without samples.
        validation_accuracy: None without a validation split.
        validation_worst_class_accuracy: as above.
        macs: multiply-accumulates of one row: of an exported step the graph's, whose fused and merged products count
            once, with exits their mean over the test split; of any other PyTorch's operators', of the deepest path.
        attention_macs: products of two activations, not part of `macs`; counted as these.
        parameters: shared ones once.
        unique_weight_bytes: parameters and buffers, shared storage once.
        exit_shares: share of the test rows that leave at each exit, the network's end last; empty without
            exits.
        file_bytes: of model.onnx and its external data, if exported.
        p50_ms: median latency of one run, if measured.
        p90_ms: 90th percentile, if measured; its upper confidence bound is in the measurement.
        metrics: what the stage reported.
        notes: what the stage has to say.
        checkpoint: its folder, relative to the run's.
        macs_of: who counted `macs`: ``graph`` or ``pytorch``.
    """

    step: str
    stage: str
    metric: str
    quality: float
    validation_quality: float | None
    accuracy: float | None
    worst_class_accuracy: float | None
    per_class: tuple[float | None, ...]
    validation_accuracy: float | None
    validation_worst_class_accuracy: float | None
    macs: float
    attention_macs: float
    parameters: int
    unique_weight_bytes: int
    exit_shares: tuple[float, ...] = ()
    file_bytes: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    metrics: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checkpoint: str = ""
    macs_of: str = "pytorch"


class Measured(NamedTuple):
    """Of one model.

    Attributes:
        fields: of a `StepRow`, those that depend on nothing but model and task.
        rows: what the test rows are worth, `Score.each` and `Score.right` under their names, where there are any.
    """

    fields: dict[str, Any]
    rows: dict[str, NDArray[Any]]


def measure(model: nn.Module, task: Task, device: torch.device) -> Measured:
    """Quality and cost of `model`.

    Args:
        model: on the CPU; comes back to it, in eval mode.
        task: has a test split.
        device: where to compute.
    """
    test = split_of(task, "test", needed_by="the report")
    exits: list[Tensor] = []
    quality = task.metric.score(_noting_exits(answers(model, test, device, specs=answers_of(task)), exits))
    fields: dict[str, Any] = {
        "metric": task.metric.name,
        "quality": quality.value,
        "validation_quality": None,
        "accuracy": quality.accuracy,
        "worst_class_accuracy": quality.worst_class_accuracy,
        "per_class": quality.per_class,
        "validation_accuracy": None,
        "validation_worst_class_accuracy": None,
    }
    if "validation" in task.splits:
        chosen = evaluate(model, task, "validation", device)
        fields["validation_quality"] = chosen.value
        fields["validation_accuracy"] = chosen.accuracy
        fields["validation_worst_class_accuracy"] = chosen.worst_class_accuracy
    fields |= _cost(model.to("cpu").eval(), test, torch.cat(exits) if exits else None)
    rows = {"each": quality.each, "right": quality.right}
    return Measured(fields, {name: array for name, array in rows.items() if array is not None})


def _cost(model: nn.Module, test: Split, exits: Tensor | None) -> dict[str, Any]:
    whole = cost.count(model, test.batch([0]).inputs)
    shares: tuple[float, ...] = ()
    if isinstance(model, MultiExit) and exits is not None:
        shares = tuple((torch.bincount(exits, minlength=len(model.specs) + 1).double() / len(exits)).tolist())
    return {
        "macs": float(whole.macs),
        "attention_macs": float(whole.attention_macs),
        "parameters": whole.parameters,
        "unique_weight_bytes": whole.unique_weight_bytes,
        "exit_shares": shares,
    }


def _noting_exits(given: Iterable[Answer], exits: list[Tensor]) -> Iterator[Answer]:
    """Passes `given` on; appends the exit of every row to `exits`, where there are exits."""
    for answer in given:
        if isinstance(answer.output, ExitOutput):
            exits.append(answer.output.exit_index)
        yield answer
