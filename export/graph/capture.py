"""PyTorch to one flat ONNX graph with the logits of every head, each value named after the module it comes from."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.manifest import AnswerSpec
from edgewright.edge_runtime.errors import ExportError
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.sources.capturable import batched_experts
from edgewright.models.sources.module_state import scripted_module, untouched
from edgewright.models.sources.precision import HALF

from .exporter_faults import mend
from .leaves import ONE_TENSOR, leaves_of
from .nested_graphs import graphs_in

MODULE_KEY = "edgewright.module"
"""The one metadata key a node carries: its torch module path."""

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_ROOT = "model."
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"

_KNOWN_FIXES = (
    (
        "Required parameter 'dim'",
        "call `.max()`/`.min()` or name the dimensions: `amax()` without `dim` has no ONNX form",
    ),
    ("complex-valued", "compute with sine and cosine: ONNX has no complex numbers, and this model's code uses them"),
    (
        "data-dependent",
        "remove Python `if`/`while` on tensor values from forward: exits are added by a stage of their own, "
        "and everything else can be written with torch.where",
    ),
    ("Could not guard on data", "remove Python `if`/`while` on tensor values from forward, e.g. with torch.where"),
    (
        "constraint",
        "make forward work for any batch size: use x.shape[0] or flatten(1), not a fixed batch in view/reshape",
    ),
)


class Outputs(nn.Module):
    """What gets captured: positional inputs to a tuple of tensors, those of the answers in their order.

    Of a network with exits the logits [N, C] of every head, the network's own last.
    """

    def __init__(self, model: nn.Module, answers: Sequence[AnswerSpec] = ONE_TENSOR) -> None:
        super().__init__()
        self.model, self.answers = model, tuple(answers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors."""
        if isinstance(self.model, MultiExit):
            return tuple(self.model.all_logits(*inputs))
        return leaves_of(self.model(*inputs), self.answers)


def flat_name(index: int) -> str:
    """Name of the flat graph's output for head or answer `index`."""
    return f"logits.{index}"


def capture(
    model: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    dynamic_axes: Sequence[Mapping[int, str]] | None = None,
    opset: int | None = None,
    answers: Sequence[AnswerSpec] = ONE_TENSOR,
) -> ir.Model:
    """Exports `model` with torch's dynamo exporter, without any optimization.

    Initializers are called like the state-dict keys; those that nothing reads are left out.
    Nodes and values are called ``<module path>/<op>``, and the only
    metadata kept is `MODULE_KEY`: the exporter would write stack traces with paths of this machine.

    Args:
        model: a classifier, or a `MultiExit`; captured in eval mode, unchanged afterwards.
        inputs: example inputs, batch first.
        input_names: names of the graph's inputs.
        dynamic_axes: per input, axis -> name; None makes every axis as the example's.
        opset: ONNX opset, None for the exporter's own.
        answers: of a model without exits: where the outputs lie in what it returns.

    Returns:
        A graph with outputs ``logits.0`` ... ``logits.K``, of the heads or of the answers.

    Raises:
        ExportError: torch cannot export the model; names the step and, where known, the remedy.
    """
    scripted = scripted_module(model)
    if scripted is not None:
        raise ExportError(f"{type(model).__name__} cannot be exported: {scripted}")
    heads = len(model.specs) + 1 if isinstance(model, MultiExit) else len(answers)
    shapes = (
        None
        if dynamic_axes is None
        else (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic_axes),)
    )
    try:
        with quietly(), torch.no_grad(), untouched(model), batched_experts(model):
            wrapper = Outputs(model, answers).eval()
            # what the first call makes and keeps must be there: the tracer would keep a fake of it
            _first_call(wrapper, inputs)
            program = torch.onnx.export(
                wrapper,
                tuple(inputs),
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                input_names=list(input_names),
                output_names=[flat_name(i) for i in range(heads)],
                dynamic_shapes=shapes,
                opset_version=opset,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(explain(model, error)) from error
    assert program is not None
    captured: ir.Model = program.model
    if dynamic_axes is not None:
        name_axes(captured.graph, dynamic_axes)
    mend(captured)
    name_everything(captured.graph, first_names(model))
    captured.metadata_props.clear()
    captured.doc_string = None
    captured.graph.name = "main"
    captured.producer_name, captured.producer_version = "edgewright", ""
    return captured


def _first_call(wrapper: Outputs, inputs: Sequence[Tensor]) -> None:
    kind = type(wrapper.model).__name__
    halves = [name for name, value in wrapper.model.state_dict().items() if value.dtype in HALF]
    if halves:
        raise ExportError(
            f"{kind} has weights in half precision ({halves[0]!r}): a bundle is proven in float32, export "
            "`model.float()`"
        )
    try:
        outputs = wrapper(*inputs)
    except ExportError:
        raise
    except Exception as error:  # a user's forward may raise anything
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise ExportError(
            f"{kind} does not run on the example rows ({shapes}), {type(error).__name__}: {error}; give the "
            "source whose data the model was made for"
        ) from error
    if any(isinstance(x, Tensor) and x.dtype in HALF for x in outputs):
        raise ExportError(
            f"{kind} answers in half precision: a bundle is proven in float32, return `.float()` and take autocast and "
            "`.half()` out of its forward"
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The exporter prints and warns about its own internals; failures are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def explain(model: nn.Module, error: Exception) -> str:
    """What stands in the way of an export, and what helps."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(chain)
    fix = next((advice for sign, advice in _KNOWN_FIXES if sign in whole), "see the cause with --debug")
    step = "torch.export" if "torch.export" in chain[0] else "the translation to ONNX"
    root = next((line.strip() for line in chain[-1].splitlines() if line.strip()), "no message")
    kind = type(model.base if isinstance(model, MultiExit) else model).__name__
    return f"{kind} cannot be exported, {step} failed: {root[:300]}. What helps: {fix}"


def name_axes(graph: ir.Graph, dynamic_axes: Sequence[Mapping[int, str]]) -> None:
    """Gives the symbolic axes (s0, s1, ...) the names that the task uses."""
    names: dict[str, str] = {}
    for value, axes in zip(graph.inputs, dynamic_axes, strict=True):
        assert value.shape is not None
        for axis, name in axes.items():
            names[str(value.shape[axis])] = name
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(d), d if isinstance(d, int) else str(d)) for d in value.shape])


def module_of(node: ir.Node) -> str:
    """Torch module path of a node, ``""`` if it has none."""
    return node.metadata_props.get(MODULE_KEY, "")


def _scope(node: ir.Node) -> str:
    """Module path from the exporter's scope list ['', 'model.a', 'model.a.b', '<fx node>'].

    Sizes that the exporter reads off an input have a scope that is no module.
    """
    text = node.metadata_props.get(_SCOPES_KEY)
    if not text:
        return ""
    scopes = [s for s in ast.literal_eval(text)[:-1] if s and s != _NO_MODULE]
    path = scopes[-1] if scopes else ""
    return re.sub(r"@\d+", "", path).removeprefix("model").removeprefix(".")


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a shared parameter or buffer -> the first one, which is the one that a checkpoint uses."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def name_everything(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Names initializers after the state dict (`names`: see `first_names`), nodes and values after their modules."""
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        own = name.removeprefix(_ROOT)
        value.name = names.get(own, own)
        graph.initializers[value.name] = value
    for node in graph.all_nodes():
        path = _scope(node)
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = path
        for value in node.outputs:
            value.metadata_props.clear()
    for inner in graph.subgraphs():
        inner.metadata_props.clear()
        for value in inner.inputs:
            value.metadata_props.clear()
    outputs = set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        # parameters of layers that do not run: they would give slack to every comparison of bytes
        if not value.uses() and value not in outputs:
            graph.initializers.pop(name)
    rename(graph)


def rename(graph: ir.Graph) -> None:
    """Names every node, and every value that is no graph output, ``<module path>/<op>``, unique over nested graphs.

    A node that a simplifier made carries no module; it takes the path of the weight it reads, else the path that its
    output was named after. That keeps the fusion of a convolution with its batch norm attributed to the convolution.
    """
    taken: set[str] = set(graph.initializers) | {v.name or "" for v in [*graph.inputs, *graph.outputs]}
    outputs = set(map(id, graph.outputs))
    initializers = {id(v) for v in graph.initializers.values()}
    for node in graph:
        path = _path(node, initializers)
        _rename_node(node, path, taken, outputs)
    for name in list(graph.initializers):
        value = graph.initializers[name]
        users = list(value.uses())
        if users and ("/" in name or re.match(r"(val_|lifted_tensor_)\d+$", name)):
            node = users[0][0]
            path = module_of(node)
            graph.initializers.pop(name)
            # a transposition that a simplifier has folded into the weight of a linear layer
            folded = node.op_type == "MatMul" and value.shape is not None and len(value.shape) == 2
            stem = f"{path}.weight.transposed" if folded else f"{path}/constant" if path else "constant"
            value.name = _unique(stem, taken)
            graph.initializers[value.name] = value


def _rename_node(node: ir.Node, path: str, taken: set[str], outputs: set[int]) -> None:
    """Names a node of module `path`, what it makes, and everything in the graphs inside it."""
    node.metadata_props[MODULE_KEY] = path
    stem = f"{path}/{node.op_type}" if path else node.op_type
    node.name = _unique(stem, taken)
    for i, value in enumerate(node.outputs):
        if id(value) not in outputs:
            value.name = _unique(node.name if i == 0 else f"{node.name}.{i}", taken, taken_by_node=i == 0)
    for graph in graphs_in(node):
        for value in graph.inputs:
            value.name = _unique(f"{node.name}/{graph.name or 'body'}", taken)
        for value in list(graph.initializers.values()):
            graph.initializers.pop(value.name or "")
            value.name = _unique(f"{node.name}/constant", taken)
            graph.initializers[value.name] = value
        for inner in graph:
            _rename_node(inner, module_of(inner) or path, taken, outputs)


def _path(node: ir.Node, initializers: set[int]) -> str:
    weights = [
        v.name for v in node.inputs if v is not None and id(v) in initializers and v.name and v.name.endswith(".weight")
    ]
    if weights and node.op_type in ("Conv", "Gemm", "ConvTranspose"):
        return weights[0].removesuffix(".weight")
    if MODULE_KEY in node.metadata_props:
        return module_of(node)
    name = node.outputs[0].name or ""
    return name.rsplit("/", 1)[0] if "/" in name else ""


def _unique(stem: str, taken: set[str], taken_by_node: bool = False) -> str:
    if taken_by_node:
        return stem
    name, count = stem, 1
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    taken.add(name)
    return name
