"""Which axis of a value counts the rows of the batch, and which values are computed from the number of rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from edgewright.edge_runtime.errors import ExportError

from ..accounts.node_table import measured_shapes
from ..graph.simplify import Feeds


class RowAxes:
    """The row axis of values, from shapes that were measured.

    Measured and not inferred: a simplifier drops the inferred shapes, and a reshape may hide where the rows went.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], feeds: Sequence[Feeds]) -> None:
        """Measures.

        Args:
            model: a flat graph with a dynamic batch axis.
            names: of values of its graph.
            feeds: inputs with two different numbers of rows, in axis 0.
        """
        self._rows = [next(iter(feed.values())).shape[0] for feed in feeds]
        inside = [name for name in dict.fromkeys(names) if name not in feeds[0]]
        self._shapes = [
            {**measured_shapes(model, inside, feed), **{name: array.shape for name, array in feed.items()}}
            for feed in feeds
        ]

    def of(self, value: ir.Value) -> int | None:
        """The axis; None if no axis depends on the number of rows.

        Raises:
            ExportError: rows are folded into another axis of the value, or fill two; names the value.
        """
        first, second = (shapes[value.name or ""] for shapes in self._shapes)
        changing = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        if not changing:
            return None
        axis = changing[0]
        if len(changing) > 1 or [first[axis], second[axis]] != self._rows:
            shown = (
                f"has shape {list(s)} for {rows} rows" for s, rows in zip((first, second), self._rows, strict=True)
            )
            raise ExportError(_refused(value, " and ".join(shown)))
        return axis


def _refused(value: ir.Value, why: str) -> str:
    node = value.producer()
    maker = f" (made by {node.op_type} {node.name!r})" if node is not None else ""
    return (
        f"rows cannot leave early at an exit: the value {value.name!r}{maker}, which later levels read, has no axis "
        f"that counts the rows alone, but {why}. Move the exit to a module whose output has one row per sample, or set "
        "export.batch to `single`"
    )


def size_nodes(nodes: Iterable[ir.Node], inputs: Collection[ir.Value]) -> set[ir.Node]:
    """Nodes that compute from shapes alone: `Shape`, and whatever reads only those and constants.

    Args:
        nodes: of a flat graph, in order.
        inputs: of that graph.
    """
    sizes: set[ir.Node] = set()
    constants: set[ir.Node | None] = {None}
    for node in nodes:
        reads = [v for v in node.inputs if v is not None]
        made_by = [v.producer() for v in reads if v not in inputs]
        if node.op_type in ("Shape", "Size"):
            sizes.add(node)
        elif len(made_by) == len(reads) and all(p in constants for p in made_by):
            constants.add(node)
        elif len(made_by) == len(reads) and all(p in constants or p in sizes for p in made_by):
            sizes.add(node)
    return sizes


class LocalSizes:
    """Recomputes in a level what an outer level has computed from the number of rows, for the rows that are left.

    Exporters read the batch size once, from the network's input, and use it in the reshapes of every level.

    Attributes:
        added: level -> the nodes that it needs for this, in order.
    """

    def __init__(
        self,
        sizes: set[ir.Node],
        axes: RowAxes,
        counts: Mapping[int, ir.Value],
        level: Mapping[ir.Node, int],
    ) -> None:
        """Prepares.

        Args:
            sizes: from `size_nodes`.
            axes: of everything a `Shape` or `Size` reads.
            counts: level -> int64 [1], the number of its rows; without level 0.
            level: of the nodes of the flat graph.
        """
        self.sizes, self.axes, self.counts, self.level = sizes, axes, counts, level
        self.added: dict[int, list[ir.Node]] = {k: [] for k in counts}
        self._known: dict[tuple[ir.Value, int], ir.Value] = {}

    def value(self, value: ir.Value, k: int) -> ir.Value:
        """What `value`, computed from sizes, is in level k; `value` itself if the number of rows is not in it.

        Raises:
            ExportError: the number of rows is in it and cannot be followed; names the value.
        """
        node = value.producer()
        if node is None or node not in self.sizes or self.level[node] == k:
            return value
        key = (value, k)
        if key not in self._known:
            self._known[key] = self._shape(node, k) if node.op_type == "Shape" else self._again(node, value, k)
        return self._known[key]

    def _again(self, node: ir.Node, value: ir.Value, k: int) -> ir.Value:
        if node.op_type == "Size":
            source = node.inputs[0]
            if source is not None and self.axes.of(source) is not None:
                raise ExportError(_refused(value, "counts the elements of a whole tensor"))
            return value
        inputs = [None if v is None else self.value(v, k) for v in node.inputs]
        if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
            return value
        outputs = self._add(node.op_type, inputs, node, k, list(node.attributes.values()))
        return outputs[list(node.outputs).index(value)]

    def _shape(self, node: ir.Node, k: int) -> ir.Value:
        source = node.inputs[0]
        assert source is not None
        axis = self.axes.of(source)
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        if axis is None:
            return node.outputs[0]
        if (source.shape is None and end is None) or start < 0 or (end is not None and end < 0):
            raise ExportError(_refused(source, "has a rank that is not known"))
        if source.shape is not None:
            end = len(source.shape) if end is None else min(end, len(source.shape))
        assert end is not None
        if not start <= axis < end:
            return node.outputs[0]
        parts: list[ir.Value] = []
        for first, last in ((start, axis), (axis + 1, end)):
            if first < last:
                span = [ir.AttrInt64("start", first), ir.AttrInt64("end", last)]
                parts.append(self._add("Shape", [source], node, k, span)[0])
            if last == axis:
                parts.append(self.counts[k])
        return parts[0] if len(parts) == 1 else self._add("Concat", parts, node, k, [ir.AttrInt64("axis", 0)])[0]

    def _add(
        self, kind: str, inputs: Sequence[ir.Value | None], like: ir.Node, k: int, attributes: Sequence[ir.Attr]
    ) -> Sequence[ir.Value]:
        node = ir.Node("", kind, inputs, attributes, num_outputs=len(like.outputs))
        node.name = f"{like.name}@level{k}.{len(self.added[k])}"
        node.metadata_props.update(like.metadata_props)
        for i, (value, old) in enumerate(zip(node.outputs, like.outputs, strict=True)):
            value.name = node.name if i == 0 else f"{node.name}.{i}"
            value.type = old.type
        self.added[k].append(node)
        return node.outputs
