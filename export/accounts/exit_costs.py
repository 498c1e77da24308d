"""What a row costs that leaves at each exit, counted on the graph before anything is exported."""

from __future__ import annotations

from itertools import accumulate

import onnx_ir.passes.common

from edgewright.models.layers.multi_exit import MultiExit

from ..exits.control_flow import levels
from ..graph.capture import capture
from ..source import Source
from .node_table import flat_costs


def exit_macs(model: MultiExit, source: Source, split: str) -> list[int]:
    """MACs of one row that leaves at exit 0, 1, ... K, K being the network's own end (METHODS §2.6).

    Counted as a bundle's manifest does: what the logits of an exit need in the graph, and every head passed on the way.
    A product that two readers share counts once, and so does one that PyTorch runs before an exit that does not need it
    not at all.

    Args:
        model: with K exits; not changed.
        source: names and inputs.
        split: its first row is run.

    Returns:
        K + 1 numbers, ascending; products in attention are not among them.

    Raises:
        ExportError: the model cannot become a graph.
    """
    inputs = source.splits[split].batch([0]).inputs
    flat = capture(model, inputs, source.input_names)
    onnx_ir.passes.common.CommonSubexpressionEliminationPass()(flat)
    row = {name: x.numpy() for name, x in zip(source.input_names, inputs, strict=True)}
    of_level = [0] * (len(model.specs) + 1)
    costs = flat_costs(flat, row)
    for node, level in levels(flat.graph, len(of_level)).items():
        if node.name in costs:
            of_level[level] += costs[node.name].weight
    return list(accumulate(of_level))
