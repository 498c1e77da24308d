"""What one row costs: multiply-accumulates per module, parameters, bytes; and where an exit may sit.

Counted is what runs, operator by operator, with torch's own formulas (METHODS §0.1: a MAC is half a FLOP;
convolutions and matrix products; everything else is free). A product of two activations (QK^T, AV) is
counted as attention, apart, because it does not shrink with the weights. A product that no input reaches is
constant and costs a device nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..errors import ModelError

_aten = torch.ops.aten


@dataclass(frozen=True)
class ModuleCost:
    """One module, everything inside it included.

    Attributes:
        macs: multiply-accumulates of one row with a weight as one factor, over all calls.
        attention_macs: multiply-accumulates of two activations.
        parameters: unique parameter elements inside.
        unique_weight_bytes: unique storage of its parameters and buffers.
        calls: how often it ran; 0 for modules that did not.
    """

    macs: int
    attention_macs: int
    parameters: int
    unique_weight_bytes: int
    calls: int


@dataclass(frozen=True)
class Cost:
    """A whole model for one row; fields as in `ModuleCost`, `per_module` by path, ``""`` the model itself."""

    macs: int
    attention_macs: int
    parameters: int
    unique_weight_bytes: int
    per_module: Mapping[str, ModuleCost]


@dataclass(frozen=True)
class Cut:
    """A module whose output an exit may read.

    Attributes:
        path: module path.
        type: class name.
        shape: of the output for one row; axis 0 is the batch.
        macs_so_far: executed when the module returns.
        share: of the model's MACs, 0 ... 1.
        attention_macs_so_far: the same for products of activations.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    macs_so_far: int
    share: float
    attention_macs_so_far: int = 0


def count(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """What `model` costs for one row.

    It runs in eval mode; afterwards modes, buffers and torch's random state are as before. Weights that
    share storage (a basis of several layers, tied embeddings) count once.

    Args:
        model: called positionally with `inputs`.
        inputs: a batch; its first row is used.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    watch = _run(model, _rows(inputs, 1))
    per_module = {}
    for path, module in model.named_modules():
        macs, attention_macs = watch.costs.get(path, (0, 0))
        per_module[path] = ModuleCost(
            macs,
            attention_macs,
            unique_parameters(module),
            unique_weight_bytes(module),
            watch.calls.get(path, 0),
        )
    whole = per_module[""]
    return Cost(whole.macs, whole.attention_macs, whole.parameters, whole.unique_weight_bytes, per_module)


def cuts(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Cut]:
    """The modules of `model` whose output an exit may read, in the order in which they return.

    These are the modules that ran once, whose output is one float tensor with 2 to 4 axes, the batch
    first, before the last MAC of the model. Where several modules return the same tensor (a container and
    its last child, an in-place activation after its producer), the last to return is listed: the outermost.
    Modules that only hand their input on (`Identity`, dropout) are left
    out.

    Args:
        model: called positionally with `inputs`.
        inputs: a batch.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    watch = _run(model, _rows(inputs, 1))
    # an axis is the batch if it grows with the batch: position embeddings are [1, T, C] for any number of
    # rows
    batched = {record.path: tuple(record.output.shape) for record in _run(model, _rows(inputs, 2)).outputs}
    total = watch.costs[""][0]
    found: dict[int, Cut] = {}
    for record in watch.outputs:
        if watch.calls[record.path] > 1:
            continue
        shape = tuple(record.output.shape)
        key = id(record.output)
        found.pop(key, None)
        if shape[0] == 1 and batched.get(record.path) == (2, *shape[1:]) and record.macs < total:
            kind = type(model.get_submodule(record.path)).__name__
            found[key] = Cut(record.path, kind, shape, record.macs, record.macs / total, record.attention_macs)
    return list(found.values())


def unique_parameters(model: nn.Module) -> int:
    """Number of parameter elements, those that share storage once."""
    return sum(size // item for size, item in _unique_bytes(model.parameters()))


def unique_weight_bytes(model: nn.Module) -> int:
    """Bytes of unique storage behind the parameters and buffers of `model`."""
    return sum(size for size, _ in _unique_bytes([*model.parameters(), *model.buffers()]))


def _unique_bytes(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Per storage: (bytes that some tensor covers, bytes of one element)."""
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        item = tensor.element_size()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((int(size) - 1) * int(stride) for size, stride in steps)
        start = int(tensor.storage_offset()) * item
        spans.setdefault(tensor.untyped_storage()._cdata, []).append((start, start + extent * item, item))
    for pieces in spans.values():
        covered, end = 0, 0
        for first, last, _ in sorted(pieces):
            covered += max(0, last - max(first, end))
            end = max(end, last)
        yield covered, pieces[0][2]


@dataclass(frozen=True)
class _Output:
    path: str
    output: Tensor
    macs: int
    attention_macs: int


class _Watch(TorchDispatchMode):
    """Counts products while a model runs; knows what the input reaches and what is running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: dict[str, tuple[int, int]] = {}
        self.calls: dict[str, int] = {}
        self.running: list[str] = []
        self.macs = self.attention_macs = 0
        self._outputs: dict[str, _Output] = {}
        # storages are kept alive, so that an address means one storage for the whole run
        self._reached: dict[int, Any] = {}

    @property
    def outputs(self) -> list[_Output]:
        """Every module's last output that is one float tensor with 2 to 4 axes, in order of return."""
        return list(self._outputs.values())

    def reach(self, tensor: Tensor) -> None:
        """Marks what depends on the model's input."""
        storage = tensor.untyped_storage()
        self._reached[storage._cdata] = storage

    def reaches(self, value: Any) -> bool:
        """True if `value` is a tensor that depends on the model's input."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._reached

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator and counts it."""
        del types
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        result = func(*args, **kwargs)
        if any(self.reaches(value) for value in given):
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self.reach(value)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, Tensor):
                    self.reach(value)
            self._charge(func, args, kwargs, result)
        return result

    def _charge(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        packet = func.overloadpacket
        if packet in _FACTORS:
            macs, (left, right) = _FACTORS[packet](*args), _OPERANDS.get(packet, (0, 1))
        elif packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=result) // 2
            left, right = _OPERANDS.get(packet, (0, 1))
        else:
            return
        attention = self.reaches(args[left]) and self.reaches(args[right])
        own, others = (0, macs) if attention else (macs, 0)
        self.macs, self.attention_macs = self.macs + own, self.attention_macs + others
        for path in dict.fromkeys(self.running):
            before = self.costs.get(path, (0, 0))
            self.costs[path] = (before[0] + own, before[1] + others)

    def keep(self, path: str, output: Any, handed_on: bool) -> None:
        """Notes the output of a module that returns now."""
        self._outputs.pop(path, None)
        fits = isinstance(output, Tensor) and output.is_floating_point() and 2 <= output.dim() <= 4
        if fits and path and not handed_on:
            self._outputs[path] = _Output(path, output, self.macs, self.attention_macs)


def _vector_product(matrix: Tensor, vector: Tensor) -> int:
    del vector
    return matrix.numel()


def _recurrent_layer(x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_: Any) -> int:
    return x.shape[0] * x.shape[1] * (input_weight.numel() + hidden_weight.numel())


_FACTORS: dict[Any, Callable[..., int]] = {
    _aten.mv: _vector_product,
    _aten.dot: _vector_product,
    _aten.addmv: lambda _bias, matrix, vector: _vector_product(matrix, vector),
    _aten.mkldnn_rnn_layer: _recurrent_layer,
}
"""MACs of operators that torch's registry lacks."""

_OPERANDS: dict[Any, tuple[int, int]] = dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv), (1, 2))
"""Positions of the two factors where they are not the first two arguments."""


def _rows(inputs: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Batches of `rows` rows made of the first row of `inputs`."""
    return tuple(x[:1].repeat(rows, *[1] * (x.dim() - 1)) for x in inputs)


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> _Watch:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = tuple(x.to(device) for x in inputs)
    watch = _Watch()
    versions: list[dict[int, int]] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
            watch.running.append(path)
            watch.calls[path] = watch.calls.get(path, 0) + 1
            versions.append({id(x): x._version for x in tree_leaves(given) if isinstance(x, Tensor)})

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: tuple[Any, ...], output: Any) -> None:
            watch.running.pop()
            before = versions.pop()
            handed_on = isinstance(output, Tensor) and before.get(id(output)) == output._version
            watch.keep(path, output, handed_on)

        return hook

    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path), prepend=True).remove)
            stack.callback(module.register_forward_hook(leave(path)).remove)
        for x in inputs:
            watch.reach(x)
        stack.enter_context(torch.no_grad())
        # fused attention kernels are invisible to the formulas, their parts are not
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without_fast_path())
        stack.enter_context(watch)
        try:
            model(*inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise ModelError(
                f"{type(model).__name__} does not run on inputs of shape {shapes}: {type(error).__name__}: {error}"
            ) from error
    watch.costs.setdefault("", (0, 0))
    return watch


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keeps `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` from running as one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, buffers and the random state as before outside."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
