"""Values that become places: indices, routes, coordinates. A NaN there would be an address.

An operation that makes integers or truth values of floats, or reads at coordinates, gives in a marked run what it gave
without marks. What it loses is noted, as the reason why the channels behind it cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten

_COORDINATES: dict[str, tuple[int, ...]] = {
    "aten::grid_sampler_2d": (1,),
    "aten::grid_sampler_3d": (1,),
    "aten::_grid_sampler_2d_cpu_fallback": (1,),
    "torchvision::deform_conv2d": (2,),
    "torchvision::roi_align": (1,),
    "torchvision::roi_pool": (1,),
    "torchvision::ps_roi_align": (1,),
    "torchvision::ps_roi_pool": (1,),
}
"""Operators that take places as floats, and which of their arguments these are."""
_SELECTING = {_aten.topk, _aten.sort, _aten.kthvalue, _aten.max, _aten.min, _aten.mode, _aten.median, _aten.cummax}
"""Operators that give values and where they were; the values are looked up."""
_HARMLESS = {
    _aten.max_pool2d_with_indices,
    _aten.max_pool3d_with_indices,
    _aten.adaptive_max_pool2d,
    _aten.adaptive_max_pool3d,
    _aten.fractional_max_pool2d,
    _aten.fractional_max_pool3d,
}
"""Operators whose indices are valid ones even of NaN, and rarely used."""
_TORCH = frozenset(
    ("aten", "prim", "prims", "quantized", "quantized_decomposed", "mkldnn", "mkldnn_prepacked", "onednn", "sparse")
)
_KNOWN = frozenset(("torchvision",))


class Decisions(TorchDispatchMode):
    """Watches a run without marks, then keeps marks out of decisions in runs with them.

    Attributes:
        foreign: operators of other libraries that were seen, by name.
        lost: where marks arrived at a decision in the last run with marks: operator -> path of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign: set[str] = set()
        self._model = model
        self._taken: dict[Any, list[Any]] = {}
        self._calls: dict[Any, int] = {}
        self.lost: dict[str, str] = {}
        self._reached: dict[int, Any] = {}
        self._running: list[str] = []
        self._recording = False
        self._aside = 0

    @contextmanager
    def recorded(self, sources: Iterable[Tensor]) -> Iterator[None]:
        """A run without marks; of interest is what depends on `sources`."""
        self._taken, self._recording, self._aside = {}, True, 0
        # storages are kept alive, so that an address means one storage for the whole run
        self._reached = {s._cdata: s for s in (tensor.untyped_storage() for tensor in sources)}
        try:
            with self:
                yield
        finally:
            self._recording, self._reached = False, {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A run with marks; afterwards `lost` tells where they arrived at a decision."""
        self._calls, self.lost, self._running = {}, {}, []
        if not self._taken:
            yield
            return
        handles = []
        for path, module in self._model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._enter(path)),
                module.register_forward_hook(self._leave),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is ours, and neither a layer's nor the model's."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    def begin_aside(self, *_: Any) -> None:
        """As a hook before a layer that will not run again."""
        self._aside += 1

    def end_aside(self, *_: Any) -> None:
        """As a hook behind it."""
        self._aside -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator."""
        del types
        kwargs = kwargs or {}
        if self._recording:
            return self._record(func, args, kwargs)
        if self._aside or func not in self._taken:
            return func(*args, **kwargs)
        return self._repeat(func, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func.namespace not in _TORCH and func.namespace not in _KNOWN:
            self.foreign.add(func.name())
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if not any(v.untyped_storage()._cdata in self._reached for v in given):
            return result
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._reached[value.untyped_storage()._cdata] = value.untyped_storage()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self._reached[value.untyped_storage()._cdata] = value.untyped_storage()
        places = _COORDINATES.get(func.name().partition(".")[0])
        if places is not None:
            taken: Any = [args[i].clone() if i < len(args) else None for i in places]
        elif func is _aten.nan_to_num.default or _decides(func, given, result):
            taken = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, result)
        else:
            return result
        # what happens inside a layer whose output is known will not happen again
        self._taken.setdefault(func, [])
        if not self._aside:
            self._taken[func].append(taken)
        return result

    def _repeat(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls[func] = self._calls.get(func, -1) + 1
        taken = self._taken[func][call] if call < len(self._taken[func]) else None
        places = _COORDINATES.get(func.name().partition(".")[0])
        given = [args[i] for i in places if i < len(args)] if places is not None else tree_leaves((args, kwargs))
        if not any(_is_marked(value) for value in given):
            return func(*args, **kwargs)
        if func is _aten.nan_to_num.default:
            # the model's own cleaning of NaN would take the marks away
            return args[0].clone()
        self.lost.setdefault(func.overloadpacket.__name__, self._running[-1] if self._running else "")
        if places is not None:
            clean = list(args)
            for i, value in zip(places, taken or [None] * len(places), strict=True):
                if i < len(args):
                    fits = value is not None and value.shape == args[i].shape
                    clean[i] = value if fits else torch.nan_to_num(args[i])
            return func(*clean, **kwargs)
        if taken is None or any(a.is_write for a in func._schema.arguments):
            return func(*tree_map(_cleaned, args), **tree_map(_cleaned, kwargs))
        if func.overloadpacket in _SELECTING and isinstance(taken, tuple | list) and len(taken) == 2:
            return _selected(func(*args, **kwargs), taken)
        return tree_map(_marked_if_float, taken)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._running.append(path)

        return hook

    def _leave(self, *_: Any) -> None:
        if self._running:
            self._running.pop()


def _decides(func: Any, given: list[Tensor], result: Any) -> bool:
    """Whether floats go in, and something that is no float comes out."""
    if func.overloadpacket in _HARMLESS or not any(v.is_floating_point() for v in given):
        return False
    return any(not (isinstance(v, Tensor) and v.is_floating_point()) for v in tree_leaves(result) if v is not None)


def _selected(found: Any, taken: Any) -> Any:
    """Values as found with marks, places as they were without; all NaN where the marks sank to the other end."""
    values, (_, places) = found[0], taken
    if not values.is_floating_point() or bool(torch.isnan(values).any()):
        return values, places.clone()
    return torch.full_like(values, float("nan")), places.clone()


def _is_marked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(torch.isnan(value).any())


def _cleaned(value: Any) -> Any:
    return torch.nan_to_num(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _marked_if_float(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.full_like(value, float("nan")) if value.is_floating_point() else value.clone()
