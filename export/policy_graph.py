"""The exit policy as small ONNX graphs, captured from the same tensor algebra that the search and PyTorch run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import ExitPolicy, policy_named

from .capture import quietly


class _Policy(nn.Module):
    """Everything a policy computes, as one module: capturing has a price that is paid once."""

    def __init__(self, policy: ExitPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, logits: Tensor, threshold: Tensor, excluded: Tensor) -> tuple[Tensor, ...]:
        first = self.policy.decide(logits, threshold, None)
        memory = None if first.excluded is None else excluded
        following = self.policy.decide(logits, threshold, memory)
        scores = self.policy.finish(logits, memory)
        decisions = [(d.decided, d.scores, d.scores.argmax(dim=1), d.excluded) for d in (first, following)]
        flat = [value for decision in decisions for value in decision if value is not None]
        return (*flat, scores, scores.argmax(dim=1))


@dataclass(frozen=True)
class PolicyGraphs:
    """Graphs for one row: inputs and outputs in the order of `ExitPolicy.decide` and `finish`.

    Attributes:
        first: (logits, threshold) -> (decided, scores, label[, excluded]).
        next: (logits, threshold[, excluded]) -> the same; equal to `first` for a policy without memory.
        finish: (logits[, excluded]) -> (scores, label).
        stateful: whether `excluded` exists.
    """

    first: ir.Model
    next: ir.Model
    finish: ir.Model
    stateful: bool


@lru_cache(maxsize=8)
def policy_graphs(name: str, classes: int, opset: int) -> PolicyGraphs:
    """Captures the policy called `name` for logits float32 [1, classes]."""
    policy = policy_named(name)
    logits, threshold, excluded = torch.randn(1, classes), torch.tensor(0.5), torch.zeros(1, classes, dtype=torch.bool)
    stateful = policy.decide(logits, threshold, None).excluded is not None
    answer = ["decided", "scores", "label", *(["excluded"] if stateful else [])]
    parts = {"first": answer, "next": answer, "finish": ["scores", "label"]}
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            _Policy(policy).eval(),
            (logits, threshold, excluded),
            dynamo=True,
            optimize=False,
            verbose=False,
            external_data=False,
            opset_version=opset,
            input_names=["logits", "threshold", "excluded"],
            output_names=[f"{part}.{output}" for part, outputs in parts.items() for output in outputs],
        )
    assert program is not None
    memory = ["excluded"] if stateful else []
    return PolicyGraphs(
        first=_part(program.model, ["logits", "threshold"], "first"),
        next=_part(program.model, ["logits", "threshold", *memory], "next"),
        finish=_part(program.model, ["logits", *memory], "finish"),
        stateful=stateful,
    )


def _part(model: ir.Model, inputs: list[str], name: str) -> ir.Model:
    """The part of the captured policy that leads from `inputs` to the outputs called ``<name>.*``."""
    part = model.clone()
    graph = part.graph
    outputs = [v for v in graph.outputs if (v.name or "").startswith(f"{name}.")]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    optimizer.optimize(part)
    values = {v.name: v for v in graph.inputs}
    graph.inputs.clear()
    graph.inputs.extend(values[i] for i in inputs)
    return part
