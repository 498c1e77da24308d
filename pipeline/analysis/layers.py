"""The structure of a model as a factorizer needs it, found in one forward pass, without architecture names.

For every leaf `nn.Linear`, `nn.Conv1d` and `nn.Conv2d`: which tensor it reads, when it runs, its shapes, and
its *role*. Two relations follow: layers that read the same tensor, and layers of one role in neighbouring blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import StageError

LayerKind: TypeAlias = Literal["linear", "conv1d", "conv2d"]

KINDS = "Linear, Conv1d or Conv2d"
"""The layers that multiply with a matrix, for messages."""

# what factorized layers answer as well; a parent that reads anything else is bound to the original class
_PUBLIC = frozenset(
    {"in_features", "out_features", "in_channels", "out_channels", "bias", "stride", "padding", "dilation"}
)


@dataclass(frozen=True)
class Layer:
    """One layer that ran, once or several times: in both branches of a siamese network, or at every step of a loop.

    Attributes:
        path: module path in the model, the first where it stands at several.
        kind: what it is.
        role: see `role_of`; equal for the same layer of neighbouring blocks.
        order: place of its first call in the order of execution, from 0.
        source: number of the tensor it reads, or of the tensors, call by call; equal where two layers read the same.
        input_width: input features or channels.
        output_width: output features or channels.
        kernel: (kh, kw); (k, 1) of one dimension; (1, 1) for linear layers.
        geometry: stride, padding and dilation, which decide the rows it multiplies; empty for linear layers.
        dtype: of the weight.
        rows: input rows per sample that its matrix multiplies: tokens, or output positions of a convolution; over all
            calls.
        input_shape: of the tensor it read in the pass, batch included, at its first call.
        output_shape: likewise.
        stem: a convolution that reads the model's input or runs before every other layer.
        logits: gives the model's output, or is the last layer to run, skipped ones counted.
        calls: how often it runs.
    """

    path: str
    kind: LayerKind
    role: str
    order: int
    source: int
    input_width: int
    output_width: int
    kernel: tuple[int, int]
    geometry: str
    dtype: torch.dtype
    rows: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stem: bool
    logits: bool
    calls: int = 1

    @property
    def fan_in(self) -> int:
        """Rows of its matrix: input width times kernel area."""
        return self.input_width * self.kernel[0] * self.kernel[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample (METHODS §0.1)."""
        return self.rows * self.fan_in * self.output_width

    @property
    def shape_class(self) -> tuple[LayerKind, int, tuple[int, int], torch.dtype]:
        """Layers can have one basis only where this is equal."""
        return (self.kind, self.input_width, self.kernel, self.dtype)

    @property
    def input_key(self) -> tuple[int, tuple[int, int], str]:
        """Equal for layers that multiply the very same rows, and so have one second moment."""
        return (self.source, self.kernel, self.geometry)


@dataclass(frozen=True)
class Skipped:
    """A layer that multiplies with a matrix and cannot be replaced, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ModelGraph:
    """What `discover` found.

    Attributes:
        layers: in the order of execution.
        skipped: in the order of the model.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]

    def readers(self) -> tuple[tuple[Layer, ...], ...]:
        """Layers by the tensor they read; one-element tuples included, in order of the first reader."""
        found: dict[int, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.source, []).append(layer)
        return tuple(tuple(group) for group in found.values())

    def roles(self) -> dict[str, tuple[Layer, ...]]:
        """Layers by role, in the order of execution: neighbours in a tuple are neighbours in depth."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.role, []).append(layer)
        return {role: tuple(group) for role, group in found.items()}


def role_of(path: str, kind: LayerKind, kernel: tuple[int, int], input_width: int) -> str:
    """What a layer does, whichever block it is in: its path without numbers, type, kernel and input width.

    ``layers.3.attention.q`` and ``layers.4.attention.q`` have one role. The number in the layer's own name
    tells siblings apart (``conv1``, ``conv2``), unless the path has no other number: in ``fc1``, ``fc2`` of a
    flat model it is the depth.
    """
    *above, last = path.split(".")
    repeated = any(re.search(r"\d", part) for part in above)
    if last.isdigit() or not repeated:
        last = re.sub(r"\d+", "*", last)
    name = ".".join([*(re.sub(r"\d+", "*", part) for part in above), last])
    return f"{name}|{kind}{kernel[0]}x{kernel[1]}|{input_width}"


@dataclass(frozen=True)
class _Call:
    path: str
    x: Tensor  # kept alive, so that no later tensor of the pass gets its address
    y: Tensor
    x_version: int  # in-place operations raise it later
    y_version: int


class _Witness(nn.Module):
    """Stands where a layer stood and notes each call and each look at its insides.

    A hook would not do: it sees neither a parent that reads `layer.weight`, nor a second reference to the
    layer that would outlive its replacement. What works with witnesses in place works with factorized layers.
    """

    def __init__(self, layer: nn.Module, calls: list[_Call], path: str) -> None:
        super().__init__()
        self.layer = layer
        self.path = path
        self.calls = calls
        self.touched: list[str] = []
        self.train(layer.training)
        # PyTorch's own fused paths (TransformerEncoderLayer) read weights directly unless a module has a hook
        self.register_forward_pre_hook(lambda _module, _inputs: None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.layer, name)
            if name not in _PUBLIC:
                self.touched.append(name)
            return value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the layer."""
        x: Tensor = args[0] if args else kwargs["input"]
        version = _version(x)
        y: Tensor = self.layer(*args, **kwargs)
        self.calls.append(_Call(self.path, x, y, version, _version(y)))
        return y


@torch.no_grad()
def discover(model: nn.Module, inputs: Sequence[Tensor]) -> ModelGraph:
    """Runs `model` once on `inputs`, in eval mode, and reads its structure off.

    A layer is skipped, with the reason, if replacing it would change what the model does: it is never called,
    shares its weight with another layer, is of a class with a forward of its own, is grouped, pads otherwise than with
    zeros, is parametrized, carries hooks, or its parent reads its weight directly.

    Args:
        model: unchanged afterwards, its training mode too.
        inputs: positional, first axis the batch; two rows are enough.

    Raises:
        StageError: the forward pass fails.
    """
    found, skipped = _candidates(model)
    calls: list[_Call] = []
    beyond: list[int] = []
    witnesses = {path: _Witness(module, calls, path) for path, module in found.items()}
    modes = {module: module.training for module in model.modules()}
    # a head that may not be replaced (tied to an embedding) still is the head: what runs before it is not
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_: beyond.append(len(calls)))
        for path in skipped
        if path
    ]
    try:
        model.eval()
        for path, witness in witnesses.items():
            replace_module(model, path, witness)
        output = model(*inputs)
    except Exception as error:
        raise StageError(
            f"the model's forward failed on inputs of shapes {[tuple(x.shape) for x in inputs]} while its "
            f"layers were watched: {type(error).__name__}: {error}; check that it takes the task's inputs "
            "positionally and does not ask for the type of its layers"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for path, module in found.items():
            replace_module(model, path, module)
        for module, mode in modes.items():
            module.training = mode
    for path, witness in witnesses.items():
        count = sum(call.path == path for call in calls)
        if witness.touched:
            skipped[path] = f"the module around it reads its {witness.touched[0]!r} directly"
        elif count == 0:
            skipped[path] = "the forward pass does not call it at this path"
    last = calls[-1:] if max(beyond, default=0) < len(calls) else []
    layers = _layers(found, calls, inputs, list(_tensors(output)), last)
    places = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return ModelGraph(
        tuple(layer for layer in layers if layer.path not in skipped),
        tuple(Skipped(path, skipped[path]) for path in sorted(skipped, key=places.__getitem__)),
    )


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every Linear, Conv1d and Conv2d by path, those that may be replaced and the reasons for those that may not."""
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, dict[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter.untyped_storage().data_ptr(), {})[module] = path
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        reason = _obstacle(module) or ("it is the whole model" if path == "" else None)
        if reason is None:
            for parameter in module.parameters(recurse=False):
                sharing = owners[parameter.untyped_storage().data_ptr()]
                others = [other for owner, other in sharing.items() if owner is not module]
                if others:
                    reason = f"shares a parameter with {others[0]!r}"
        if reason is None:
            found[path] = module
        else:
            skipped[path] = reason
    return found, skipped


def _obstacle(module: nn.Linear | nn.Conv1d | nn.Conv2d) -> str | None:
    plain = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, kind))
    own_forward = type(module).forward is not plain.forward
    if not isinstance(module, nn.Linear):
        own_forward |= type(module)._conv_forward is not vars(plain)["_conv_forward"]
    if own_forward:
        return f"its class {type(module).__name__} has a forward of its own"
    whole: str | None = getattr(module, "kept_whole", None)
    if whole is not None:
        return whole
    if set(module._parameters) != {"weight", "bias"} or module.weight is None or module._modules or module._buffers:
        return "its weight is parametrized"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "hooks are attached to it"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    if not isinstance(module, nn.Linear):
        if module.groups != 1:
            return f"a grouped convolution ({module.groups} groups)"
        if module.padding_mode != "zeros":
            return f"pads with {module.padding_mode!r}"
    return None


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where `path` points to, and wherever else the layer stands that stood there."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                # not setattr: a parent may guard it, and the place among its siblings must stay
                parent._modules[name] = module


def _layers(
    modules: Mapping[str, nn.Module],
    calls: Sequence[_Call],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    at_the_end: Sequence[_Call],
) -> list[Layer]:
    entrances = {_address(x) for x in inputs}
    exits = {(_address(y), _version(y)) for y in outputs}
    last = {c.path for c in calls if (_address(c.y), c.y_version) in exits} or {c.path for c in at_the_end}
    sources: dict[tuple[Any, ...], int] = {}
    layers = []
    of_path: dict[str, list[_Call]] = {}
    for call in calls:
        of_path.setdefault(call.path, []).append(call)
    for order, mine in enumerate(of_path.values()):
        call = mine[0]
        module = modules[call.path]
        kind: LayerKind = "linear"
        kernel, geometry = (1, 1), ""
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            kind = "conv1d" if isinstance(module, nn.Conv1d) else "conv2d"
            kernel = (module.kernel_size[0], module.kernel_size[-1] if kind == "conv2d" else 1)
            geometry = f"stride {module.stride} padding {module.padding} dilation {module.dilation}"
        weight = module.get_parameter("weight")
        out, width = weight.shape[0], weight.shape[1]
        layers.append(
            Layer(
                path=call.path,
                kind=kind,
                role=role_of(call.path, kind, kernel, width),
                order=order,
                source=sources.setdefault(tuple(_identity(each, kind) for each in mine), len(sources)),
                input_width=width,
                output_width=out,
                kernel=kernel,
                geometry=geometry,
                dtype=weight.dtype,
                rows=max(1, sum(each.y.numel() for each in mine) // out // max(1, inputs[0].shape[0])),
                input_shape=tuple(call.x.shape),
                output_shape=tuple(call.y.shape),
                stem=kind != "linear" and (order == 0 or any(_address(each.x) in entrances for each in mine)),
                logits=call.path in last,
                calls=len(mine),
            )
        )
    return layers


def _identity(call: _Call, kind: LayerKind) -> tuple[Any, ...]:
    """Equal for two reads of the same numbers."""
    x = call.x
    place = (_address(x), x.storage_offset(), call.x_version, x.dtype, kind)
    if kind == "linear" and x.is_contiguous():
        # the rows are the same whether the reader gets [N, T, d] or a view [N * T, d]
        return (*place, x.numel(), x.shape[-1])
    return (*place, tuple(x.shape), x.stride())


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
