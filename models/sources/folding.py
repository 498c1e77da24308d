"""Weights that are computed from others, and branches that stand for one layer: folded before any compression.

Parametrized weights (weight norm, spectral norm, old and new, and every other parametrization of torch) become plain
ones, and so do those that transformers' ``Conv1D`` stores transposed. Networks that are trained with parallel branches
and deployed with one layer in their place (RepVGG, MobileOne, FastViT, RepViT) bring the method that joins them; it is
called where it makes a module simpler and leaves what the module computes as it is. Both are tried on a copy first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .module_state import copied

JOINING = ("reparameterize", "switch_to_deploy", "fuse")
"""Methods without arguments by which networks join their own branches, in the order in which they are looked for."""
_FREE = ("batch_norm", "aten::empty", "_unsafe_view", "aten::detach", "aten::alias")
"""Operations that do not count when modules are compared: norms that a layer may take in, memory and shapes."""
TOLERANCE = 1e-4
"""Largest difference of a folded module's, and model's, outputs, relative to their largest number."""


@dataclass(frozen=True)
class Folds:
    """What is folded in a model.

    Attributes:
        weights: modules whose computed weights become plain ones.
        joined: modules whose branches are joined, and the method that does it, in the order in which it has to be done.
        notes: what the user should know.
    """

    weights: tuple[str, ...] = ()
    joined: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return bool(self.weights or self.joined)

    def data(self) -> dict[str, Any]:
        """As JSON; `from_data` reads it."""
        return {"weights": list(self.weights), "joined": [list(pair) for pair in self.joined]} if self else {}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Folds:
        """What `data` wrote.

        Raises:
            KeyError: it did not.
        """
        if not data:
            return Folds()
        return Folds(tuple(data["weights"]), tuple((path, method) for path, method in data["joined"]))


@torch.no_grad()
def find_folds(model: nn.Module, inputs: Sequence[Tensor]) -> Folds:
    """What can be folded in `model`, tried on copies of it; what would change its answers is left out, with a note.

    Args:
        model: in eval mode; stays as it is, and is not called.
        inputs: of some rows.
    """
    weights = tuple(path for path, module in model.named_modules() if _has_computed_weights(module))
    able = [(path, method) for path, module in model.named_modules() if (method := _joining_method(module))]
    if not weights and not able:
        return Folds()
    trial = copied(model).eval()
    with _Watched(trial, [path for path, _ in able]) as calls:
        try:
            before = _numbers(trial(*inputs))
        except Exception:  # what is wrong with it is for others to say, with the module's name
            return Folds()
    notes = []
    for path in weights:
        trial = _replaced(trial, path, _made_plain(trial.get_submodule(path)))
    trial, joined, left = _join(trial, able, calls)
    folds = Folds(weights, joined)
    difference = _difference(before, _numbers(copied(trial)(*inputs))) if folds else 0.0
    if difference > TOLERANCE:
        return Folds(notes=(f"{_what(folds)} could be folded, and is left as it is: {_by(difference)}",))
    if folds:
        notes.append(f"{_what(folds)} folded before any compression: {_by(difference)}")
    return Folds(weights, joined, (*notes, *left))


@torch.no_grad()
def fold(model: nn.Module, folds: Folds) -> nn.Module:
    """Does to `model` what `find_folds` found, in place, and returns it, or what took its place.

    Raises:
        AttributeError: it has no such module.
    """
    for path in folds.weights:
        model = _replaced(model, path, _made_plain(model.get_submodule(path)))
    for path, method in folds.joined:
        model = _replaced(model, path, _joined(model.get_submodule(path), method))
    return model


def _has_computed_weights(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or is_transposed_linear(module) or any(_old_norms(module))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is the ``Conv1D`` of transformers: a linear layer that stores its weight [in, out] (GPT-2)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def plain_linear(module: Any) -> nn.Linear:
    """The `nn.Linear` that computes what a transposed linear layer does, with its numbers.

    Args:
        module: see `is_transposed_linear`.
    """
    weight: nn.Parameter = module.weight
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def _made_plain(module: nn.Module) -> nn.Module:
    """`module` with plain weights, or what takes its place."""
    if is_transposed_linear(module):
        return plain_linear(module)
    _make_plain(module)
    return module


def _old_norms(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm))


def _make_plain(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        # copies share the class that torch made for this one module, and it loses the weight's property
        kind = type(module)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        computed: Any = module.parametrizations
        for name in list(computed):
            originals = list(computed[name].parameters())
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            value = getattr(module, name)
            if not isinstance(value, nn.Parameter):  # so it is where no gradients are kept
                delattr(module, name)
                trainable = any(original.requires_grad for original in originals)
                module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=trainable))
    for norm in list(_old_norms(module)):
        remove = remove_weight_norm if isinstance(norm, WeightNorm) else remove_spectral_norm
        remove(module, norm.name)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # it computes with a list of its weights, which still holds those of before


def _joining_method(module: nn.Module) -> str | None:
    """The method by which a module joins its branches, if it has one that wants nothing."""
    for name in JOINING:
        method = getattr(type(module), name, None)
        if callable(method):
            try:
                wanted = list(inspect.signature(method).parameters.values())[1:]
            except (TypeError, ValueError):
                return None
            optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            if all(p.default is not p.empty or p.kind in optional for p in wanted):
                return name
    return None


def _join(
    model: nn.Module, able: Sequence[tuple[str, str]], calls: Mapping[str, _Call]
) -> tuple[nn.Module, tuple[tuple[str, str], ...], list[str]]:
    """Joins what can be joined, inner modules first; the model, what was done, and notes on what was left alone."""
    done: list[tuple[str, str]] = []
    left: list[str] = []
    for path, method in reversed(able):  # a module's children stand behind it
        call = calls.get(path)
        if call is None:
            continue  # it does not run
        module = model.get_submodule(path)
        try:
            trial = _joined(copied(module), method)
            with _Operations() as after:
                output = trial(*call.args, **call.options)
            with _Operations() as before:
                module(*call.args, **call.options)
            if after.count >= before.count:
                continue  # nothing was joined
            difference = _difference(call.output, _numbers(output))
        except Exception as error:  # a stranger's method may raise anything; the module then stays
            left.append(f"{path!r} keeps its branches: its {method}() failed ({type(error).__name__}: {error})")
            continue
        if difference > TOLERANCE:
            left.append(f"{path!r} keeps its branches: after its {method}(), {_by(difference)}")
            continue
        model = _replaced(model, path, trial)
        done.append((path, method))
    return model, tuple(done), left


def _joined(module: nn.Module, method: str) -> nn.Module:
    """`module` after its method, or what the method returns in its place; its weights can be trained as before."""
    trainable = any(parameter.requires_grad for parameter in module.parameters())
    made = getattr(module, method)()
    joined = made if isinstance(made, nn.Module) else module
    for parameter in joined.parameters():
        parameter.requires_grad_(trainable)
    return joined.train(module.training)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed, without batch norms: a layer that took in its own is no simpler, exports do that."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchDispatchMode`."""
        free = func.is_view or any(name in func.name() for name in _FREE)
        self.count += not free
        return func(*args, **(kwargs or {}))


def _replaced(model: nn.Module, path: str, made: nn.Module) -> nn.Module:
    """Puts `made` wherever the module at `path` stands, and returns the model."""
    if not path:
        return made
    old = model.get_submodule(path)
    if made is not old:
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = made
    return model


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    options: dict[str, Any]
    output: list[Tensor]


class _Watched:
    """The first call of each of some modules, kept while it is open."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model, self._paths = model, paths
        self._calls: dict[str, _Call] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, _Call]:
        for path in self._paths:

            def note(_: nn.Module, args: Any, options: Any, output: Any, path: str = path) -> None:
                if path not in self._calls:
                    self._calls[path] = _Call(args, options, _numbers(output))

            self._handles.append(self._model.get_submodule(path).register_forward_hook(note, with_kwargs=True))
        return self._calls

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _numbers(output: Any) -> list[Tensor]:
    """Copies of the float tensors in what a module returned."""
    return [x.detach().clone() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest number of each tensor; infinite where they do not fit."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.numel():
            scale = max(float(a.abs().max()), torch.finfo(a.dtype).tiny)
            found = float((a - b).abs().max()) / scale
            worst = max(worst, found) if found == found else float("inf")
    return worst


def _what(folds: Folds) -> str:
    parts = []
    if folds.weights:
        parts.append(f"the computed or transposed weights (weight norm and the like) of {_listed(folds.weights)}")
    if folds.joined:
        methods = " and ".join(sorted({f"{method}()" for _, method in folds.joined}))
        parts.append(f"the branches of {_listed([path for path, _ in folds.joined])}, by {methods},")
    return " and ".join(parts)


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, sorted(paths)[:3]))
    return f"{len(paths)} module(s) ({shown}{', ...' if len(paths) > 3 else ''})"


def _by(difference: float) -> str:
    return f"its answers differ by {difference:.1e} of the largest one"
