"""Whether a model answers a row always the same: asked twice, after other rows, and beside another row.

What differs has one of three causes, and each has its own remedy: random numbers, state that every call changes, and
rows of a batch that are mixed. They are told apart by asking for one row from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgewright.models.sources.module_state import untouched
from edgewright.models.sources.python_source import place_of

from ..errors import ModelError
from .failing_module import Running, watched, where

Rows: TypeAlias = tuple[Tensor, ...]
_OBSERVERS = (
    "Update such values only `if self.training:`; observers of quantization are switched off with "
    "model.apply(torch.ao.quantization.disable_observer)"
)
_ALIKE = 1e-3  # of the largest answer; float32 is off by a hundredth of that


@torch.no_grad()
def check_rows(model: nn.Module, inputs: Rows, name: str, answer: Callable[[Rows], Tensor]) -> Tensor:
    """What `model` answers to `inputs`, after it was seen that its rows are answered always the same.

    Args:
        model: in eval mode.
        inputs: one row or two.
        name: as the recipe calls the model.
        answer: runs the model on `inputs`, and raises `ModelError` where it returns something that is no answer.

    Raises:
        ModelError: a row is answered otherwise alone, after other rows, or when it is asked for again.
    """
    # each row first, as the model answers it before it has seen another
    orders = [inputs] if len(inputs[0]) == 1 else [inputs, tuple(x.flip(0) for x in inputs)]
    fresh = [_fresh(model, _first(order)) for order in orders]
    output = answer(inputs)
    versions = {key: (id(buffer), buffer._version) for key, buffer in model.named_buffers()}
    alone = _alone(model, _first(inputs), name)
    written = [key for key, b in model.named_buffers() if versions.get(key) != (id(b), b._version)]
    if alone.shape != output[:1].shape:
        raise ModelError(
            f"{name} answers one row with {list(alone.shape)}, and {list(output[:1].shape)} is needed: squeeze() "
            "without an axis takes the axis of the rows too when there is one row, name the axis"
        )
    for place, (order, answered) in enumerate(zip(orders, fresh, strict=True)):
        others = [output[place : place + 1], *([alone] if place == 0 else [])]
        if any(_off(answered, other) is not None for other in others):
            _name_the_cause(model, order, name)
    _check_written(model, _first(inputs), name, [key for key in written if key in versions])
    return output


def _first(inputs: Rows) -> Rows:
    return tuple(x[:1] for x in inputs)


def _name_the_cause(model: nn.Module, inputs: Rows, name: str) -> None:
    """Raises it; returns if the first call of all made something and kept it, and was another only for that."""
    row = _first(inputs)
    one, other = _Seen(), _Seen()
    for seen in (one, other):
        with untouched(model), seen.watching(model):
            model(*row)
    if (off := _off(one.answer, other.answer)) is not None:
        raise ModelError(
            f"{name} answers the same row otherwise every time it is asked (off by {off:.3g}), in eval mode: "
            f"{_random_source(one, other)}"
        )
    with untouched(model):
        before = _state(model)
        model(*inputs)
        changed = [key for key, value in _state(model).items() if not _equal(value, before.get(key))]
        after = _Seen()
        with after.watching(model):
            model(*row)
    if (off := _off(one.answer, after.answer)) is not None:
        named = f" ({', '.join(map(repr, changed[:3]))}{', ...' if len(changed) > 3 else ''})" if changed else ""
        raise ModelError(
            f"{name} answers a row otherwise after it has seen others (off by {off:.3g}): in eval mode it changes its "
            f"own state at every call{named}{_module(one, after)}. {_OBSERVERS}"
        )
    beside = _Seen()
    with untouched(model), beside.watching(model):
        model(*inputs)
    if beside.answer is not None and (off := _off(one.answer, beside.answer[:1])) is not None:
        raise ModelError(
            f"{name} answers a row otherwise when another is beside it (off by {off:.3g}), in eval mode: something "
            f"mixes the rows of a batch{_module(one, beside)}, e.g. a BatchNorm without running statistics or one "
            "that is kept in training mode. Normalise with running statistics, or with LayerNorm or GroupNorm, which "
            "take each row by itself"
        )


def _check_written(model: nn.Module, row: Rows, name: str, written: list[str]) -> None:
    """Of buffers that a second call wrote to, refuses those that an answer depends on, however little they moved."""
    floats = [key for key, buffer in model.named_buffers() if key in written and buffer.is_floating_point()]
    usual = _fresh(model, row) if floats else None
    # far off: a step of a quantization is small beside an answer
    for factor, shift in ((100.0, 0.0), (1.0, 10.0)) if floats else ():
        with untouched(model):
            for key in floats:
                model.get_buffer(key).mul_(factor).add_(shift)
            other = _fresh(model, row)
        if _off(usual, other) is not None:
            kinds = sorted({type(model.get_submodule(key.rpartition(".")[0])).__name__ for key in floats})
            raise ModelError(
                f"{name} changes its own state at every call, in eval mode too, and answers by it: "
                f"{', '.join(map(repr, floats[:3]))}{', ...' if len(floats) > 3 else ''} ({', '.join(kinds)}). "
                f"{_OBSERVERS}"
            )


def _fresh(model: nn.Module, row: Rows) -> Tensor | None:
    """The answer to a row, whose traces are taken back; None if there is none, of which others have to tell."""
    try:
        with untouched(model):
            output = model(*row)
    except Exception:  # a user's forward may raise anything; with both rows it will again, and be told
        return None
    return output if isinstance(output, Tensor) else None


def _alone(model: nn.Module, row: Rows, name: str) -> Tensor:
    running: Running = []
    try:
        with watched(model, running):
            alone: Tensor = model(*row)
    except Exception as error:  # as above
        raise ModelError(
            f"{name} runs on two rows and not on one{place_of(error)}: {type(error).__name__}: "
            f"{error}{where(running, error)}. It could be trained, but not exported: make forward work for any number "
            "of rows"
        ) from error
    return alone


def _off(one: Tensor | None, other: Tensor | None) -> float | None:
    """How far two answers are apart; None if they are alike."""
    if one is None or other is None or one.shape != other.shape or not one.numel():
        return None
    off = float((one - other).abs().max())
    return None if off <= _ALIKE * (1.0 + float(other.abs().max())) else off


class _Seen(TorchDispatchMode):
    """What the modules of a model got and gave for the first row in one run, and which of them drew random numbers.

    Attributes:
        answer: the model's.
        modules: path -> inputs and outputs of its last call, in the order in which they returned.
        drawn: path of the innermost module -> the operator.
        kinds: path -> class name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer: Tensor | None = None
        self.modules: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.drawn: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self._running: Running = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watches one run inside."""
        given: dict[str, list[Tensor]] = {}

        def enter(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any) -> None:
                given[path] = _first_row(args)

            return hook

        def leave(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.modules[path] = given.get(path, []), _first_row(output)
                if path == "" and isinstance(output, Tensor):
                    self.answer = output.detach().clone()

            return hook

        handles = []
        self.kinds = {path: type(module).__name__ for path, module in model.named_modules()}
        for path, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave(path))]
        try:
            with watched(model, self._running), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator, and notes it if it draws."""
        del types
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.setdefault(self._running[-1][0] if self._running else "", func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _first_row(values: Any) -> list[Tensor]:
    return [v.detach()[:1].clone() for v in tree_leaves(values) if isinstance(v, Tensor) and v.dim()]


def _origin(one: _Seen, other: _Seen) -> str | None:
    """The first module that gave something else for the same."""
    for path, (got, gave) in one.modules.items():
        again = other.modules.get(path)
        if again is not None and _all_equal(got, again[0]) and not _all_equal(gave, again[1]):
            return path
    return None


def _all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _called(path: str, seen: _Seen) -> str:
    kind = seen.kinds.get(path, "")
    return f"{path!r} ({kind})" if path else f"the forward of {kind or 'the model'} itself"


def _module(one: _Seen, other: _Seen) -> str:
    path = _origin(one, other)
    return "" if path is None else f", in {_called(path, one)}"


def _random_source(one: _Seen, other: _Seen) -> str:
    path = _origin(one, other)
    # a module that draws and a module around it: the inner one returns first
    place = path if path in one.drawn or not one.drawn else next(iter(one.drawn))
    drawn = one.drawn.get(place or "")
    who = _called(place or "", one)
    if drawn is None:
        return (
            f"{who} depends on something that changes by itself, such as random numbers of Python or NumPy, or the "
            "time; take it out of eval mode, or give it as an input"
        )
    if "Dropout" in one.kinds.get(place or "", ""):
        advice = "it is kept in training mode: leave it to model.eval(), without a train() of your own"
    elif "dropout" in drawn or "bernoulli" in drawn:
        advice = (
            "F.dropout(x, p) drops in eval mode as well: write F.dropout(x, p, training=self.training), or use "
            "nn.Dropout"
        )
    else:
        advice = "draw only `if self.training:`, and go on with the mean, or the most likely, otherwise"
    return f"{who} draws random numbers ({drawn}); {advice}"


def _state(model: nn.Module) -> dict[str, Any]:
    """Values that a forward may keep on its modules: buffers, parameters, and plain numbers and tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        tables = (module._parameters, module._buffers, vars(module))
        for key, value in (item for table in tables for item in table.items()):
            if isinstance(value, Tensor | int | float):
                found[f"{path}.{key}" if path else key] = value.detach().clone() if isinstance(value, Tensor) else value
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)
