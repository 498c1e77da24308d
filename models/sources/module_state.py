"""A user's module as it was before we ran and traced it, and copies of it, whatever its forward keeps on it."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType,
)  # fmt: skip
_FOREIGN = ("torch", "numpy", "builtins")
"""Packages whose objects are left alone, modules and containers excepted."""


M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """A deep copy, also of a module that keeps results of a call with gradients, as old weight norm does."""
    record = _Record(values=False)
    record.note(model)
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in record.tensors() if not t.is_leaf}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts everything back at the end that running or tracing `model` changes on it, also after an error.

    A forward may make a table at its first call and keep it: in an attribute, in a list or dict, in a buffer, on a
    helper object. Under the tracer such a table is a fake tensor, and no later call could use it. Back come
    attributes, buffers, hooks, training flags, gradients and ``requires_grad``, and the containers that hold them are
    the same objects as before. Values of parameters are not copied: only a training changes them.

    Args:
        model: any module.
    """
    record = _Record(values=True)
    record.note(model)
    try:
        yield
    finally:
        record.restore()


class _Record:
    """What was found on a module, and the objects that hold it; with the values of all tensors but parameters."""

    def __init__(self, values: bool) -> None:
        self._keep_values = values
        self._seen: dict[int, Any] = {}
        self._fields: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, bool, Tensor | None]] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def note(self, found: Any) -> None:
        """Remembers `found` and what it holds."""
        waiting = [found]
        while waiting:
            value = waiting.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # kept alive, so that no other object gets its id
            if isinstance(value, Tensor):
                self._note_tensor(value)
            elif isinstance(value, dict):
                self._containers.append((value, dict(value)))
                waiting += value.values()
            elif isinstance(value, list | set | deque):
                self._containers.append((value, list(value)))
                waiting += value
            elif isinstance(value, tuple | frozenset):
                waiting += value
            elif isinstance(value, nn.Module) or _is_users(value):
                self._fields.append((vars(value), dict(vars(value))))
                waiting += vars(value).values()

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that was found."""
        return (value for value in self._seen.values() if isinstance(value, Tensor))

    def restore(self) -> None:
        """Puts back what was noted."""
        for container, content in self._containers:
            container.clear()
            if isinstance(container, dict | set):
                container.update(content)
            else:
                container.extend(content)
        for fields, content in self._fields:
            fields.clear()
            fields.update(content)
        for tensor, value in self._values:
            # only where needed: a write would spoil a backward pass that the user has still to do
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)
        for tensor, wanted, gradient in self._tensors:
            if tensor.requires_grad != wanted:
                tensor.requires_grad_(wanted)
            tensor.grad = gradient

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.is_leaf:
            self._tensors.append((tensor, tensor.requires_grad, tensor.grad))
        if self._keep_values and not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
            self._values.append((tensor, tensor.detach().clone()))


def _is_users(value: Any) -> bool:
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _FOREIGN
