"""The exit policy as small ONNX graphs, captured from the same tensor algebra that the search and PyTorch run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import ExitPolicy, policy_named

from ..graph.capture import MODULE_KEY, quietly


class _Policy(nn.Module):
    """Everything a policy computes, as one module: capturing has a price that is paid once."""

    def __init__(self, policy: ExitPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, logits: Tensor, threshold: Tensor, excluded: Tensor) -> tuple[Tensor, ...]:
        first = self.policy.decide(logits, threshold, None)
        memory = None if first.excluded is None else excluded
        following = self.policy.decide(logits, threshold, memory)
        decisions = [(d.decided, d.scores, d.excluded) for d in (first, following)]
        flat = [value for decision in decisions for value in decision if value is not None]
        return (*flat, self.policy.finish(logits, memory))


@dataclass(frozen=True)
class PolicyGraphs:
    """Graphs for one row, or for any number: inputs and outputs in the order of `ExitPolicy.decide` and `finish`.

    Attributes:
        first: (logits, threshold) -> (decided, scores[, excluded]).
        next: (logits, threshold[, excluded]) -> the same; equal to `first` for a policy without memory.
        finish: (logits[, excluded]) -> (scores,).
        stateful: whether `excluded` exists.
    """

    first: ir.Model
    next: ir.Model
    finish: ir.Model
    stateful: bool


@lru_cache(maxsize=8)
def policy_graphs(name: str, classes: int, opset: int, any_rows: bool = False) -> PolicyGraphs:
    """Captures the policy called `name` for logits float32 [1, classes], or [N, classes] with `any_rows`."""
    policy = policy_named(name)
    rows = 2 if any_rows else 1
    logits, threshold = torch.randn(rows, classes), torch.tensor(0.5)
    excluded = torch.zeros(rows, classes, dtype=torch.bool)
    axis = {0: torch.export.Dim("rows")}
    stateful = policy.decide(logits, threshold, None).excluded is not None
    answer = ["decided", "scores", *(["excluded"] if stateful else [])]
    parts = {"first": answer, "next": answer, "finish": ["scores"]}
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            _Policy(policy).eval(),
            (logits, threshold, excluded),
            dynamo=True,
            optimize=False,
            verbose=False,
            external_data=False,
            opset_version=opset,
            dynamic_shapes=(axis, None, axis) if any_rows else None,
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


def splice(source: ir.Model, inputs: Sequence[ir.Value], nodes: list[ir.Node], prefix: str) -> list[ir.Value]:
    """Copies the nodes of a policy graph behind `nodes`.

    Two nodes of a policy are saved where the surroundings do their work already: a `Neg` of logits that a `Gemm`
    can produce with the other sign, and a `Cast` that an outer level has made of the same value.

    Args:
        source: one of `PolicyGraphs`.
        inputs: values of the graph that is being built, in the order of the policy graph's inputs.
        nodes: of that graph; the copies are appended.
        prefix: of the copies' names.

    Returns:
        The policy graph's outputs, as values of the graph that is being built.
    """
    copy = source.clone().graph
    values = dict(zip(copy.inputs, inputs, strict=True))
    outputs = list(copy.outputs)
    copy.outputs.clear()
    counts: dict[str, int] = {}
    for name, value in list(copy.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value}, name=f"{prefix}/{name}")
        constant.outputs[0].name = f"{prefix}/{name}"
        constant.outputs[0].type, constant.outputs[0].shape = value.type, value.shape
        constant.metadata_props[MODULE_KEY] = ""
        values[value] = constant.outputs[0]
        nodes.append(constant)
    for node in list(copy):
        copy.remove(node)
        for i, read in enumerate(node.inputs):
            if read is not None and read in values:
                node.replace_input_with(i, values[read])
        known = _negated(node) or _converted(node)
        if known is not None:
            values[node.outputs[0]] = known
            node.replace_input_with(0, None)
            continue
        stem = f"{prefix}/{node.op_type}"
        counts[stem] = counts.get(stem, 0) + 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = ""
        for i, value in enumerate(node.outputs):
            value.name = node.name if i == 0 else f"{node.name}.{i}"
            value.metadata_props.clear()
        nodes.append(node)
    return [values.get(v, v) for v in outputs]


def _negated(node: ir.Node) -> ir.Value | None:
    """What `node` computes, if it is the only reader of a `Gemm` and negates it: the Gemm is changed."""
    if node.op_type != "Neg":
        return None
    value = node.inputs[0]
    assert value is not None
    product = value.producer()
    if product is None or product.op_type != "Gemm" or len(value.uses()) > 1:
        return None
    for name in ("alpha", "beta"):
        old = product.attributes[name].as_float() if name in product.attributes else 1.0
        product.attributes[name] = ir.AttrFloat32(name, -old)
    value.name = f"{value.name}.negated"
    return value


def _converted(node: ir.Node) -> ir.Value | None:
    """The result of another `Cast` of the same value to the same type, which an outer level has made."""
    if node.op_type != "Cast":
        return None
    value = node.inputs[0]
    assert value is not None
    for other, _ in value.uses():
        if other is not node and other.op_type == "Cast" and other.attributes["to"] == node.attributes["to"]:
            return other.outputs[0]
    return None
