"""Where exits may sit, which places a recipe means, and what a row costs that leaves at each of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedConv1d, FactorizedConv2d, FactorizedLinear
from edgewright.models.layers.multi_exit import HeadSpec

from ...analysis import cost
from ...errors import RecipeError, StageError

_NEAR = 0.12  # of the network's MACs: how far a place may be from what was asked and still be preferred
LATEST = 0.97
"""An exit after this share of the MACs saves nothing."""

_FEATURES_FIRST = (
    nn.Conv1d,
    nn.Conv2d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    FactorizedConv1d,
    FactorizedConv2d,
)
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, FactorizedLinear)


@dataclass(frozen=True)
class Place:
    """A module whose output an exit can read.

    Attributes:
        path: module path.
        shape: of the output for one row; axis 0 is the batch.
        axis: the feature axis.
        macs: executed when the module returns.
        order: position in the order in which modules return.
    """

    path: str
    shape: tuple[int, ...]
    axis: int
    macs: int
    order: int

    @property
    def tokens(self) -> int | None:
        """T where the output is a sequence of tokens [N, T, C], else None."""
        return self.shape[1] if len(self.shape) == 3 and self.axis == 2 else None

    def head(
        self, pool: int = 1, token: int | None = None, mask: tuple[int, int] | None = None, hidden: int = 0
    ) -> HeadSpec:
        """A head that reads here.

        Args:
            pool: side of the pooled map; shrinks to what divides the map, so that it stays one ONNX node.
            token: read this token alone.
            mask: which input says what tokens count, and for how many it does; left out where that is another number.
            hidden: width of the hidden layer, 0 for none.

        Raises:
            StageError: a token is to be read and there are none.
        """
        dims = len(self.shape)
        if token is not None and self.tokens is None:
            raise StageError(
                f"early_exit.head: token reads one of the tokens [N, T, C], and {self.path!r} returns "
                f"{list(self.shape)}: use `head: pooled` or other places (`edgewright cuts` lists them with shapes)"
            )
        masked = mask[0] if mask is not None and token is None and mask[1] == self.tokens else None
        if dims == 4:
            sides = [size for a, size in enumerate(self.shape) if a not in (0, self.axis)]
            pool = max(p for p in range(1, pool + 1) if all(size % p == 0 for size in sides))
        usual = self.axis == (2 if dims == 3 else 1)
        return HeadSpec(
            self.path,
            self.shape[self.axis],
            pool=pool if dims == 4 else 1,
            axis=None if usual else self.axis,
            token=token,
            mask=masked,
            hidden=hidden,
        )


@dataclass(frozen=True)
class _Seen:
    output: Any
    axis: int
    order: int
    runs: int


def places(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Place]:
    """Every place for an exit by module path, in the order in which the modules return.

    These are the modules that `cost.cuts` lists and that run exactly once, and beside them those that
    return the same tensor as one of them, e.g. the last child of a container.

    Args:
        model: a classifier, called positionally.
        inputs: a batch; its first row is used.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    cuts = {cut.path: cut for cut in cost.cuts(model, inputs)}
    seen = _watch(model, inputs)
    macs_of = {id(seen[path].output): cut.macs_so_far for path, cut in cuts.items() if path in seen}
    found: dict[str, Place] = {}
    for path, here in sorted(seen.items(), key=lambda item: item[1].order):
        macs = macs_of.get(id(here.output))
        if path and macs is not None and here.runs == 1:
            found[path] = Place(path, tuple(here.output.shape), here.axis, macs, here.order)
    return found


def choose_places(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    at: Sequence[str],
    at_macs: Sequence[float],
    tokens: bool = False,
) -> list[Place]:
    """The places a recipe asks for, in order of depth.

    Args:
        model: a classifier, called positionally.
        inputs: a batch.
        at: module paths; if empty, `at_macs` counts.
        at_macs: shares of the network's MACs. Among the modules within 0.12 of a share the outermost are
            preferred (a whole block to a layer inside it), among those the nearest. Shares that lead to a
            place already taken get the next one; where there are fewer places than shares, there are fewer
            exits.
        tokens: `at_macs` means places with tokens [N, T, C] only.

    Returns:
        The places; none where `at` is empty and no module returns something useful between the first and the last
        layer with weights.

    Raises:
        RecipeError: a path that does not exist or is named twice.
        StageError: no exit can sit at a path, or nowhere in the model although paths are given.
    """
    found = places(model, inputs)
    if at and not found:
        raise StageError(
            f"no module of {type(model).__name__} can carry an exit: none returns one float tensor with 2 to 4 axes, "
            "batch first, before the end; split its forward into submodules"
        )
    if at:
        for path in at:
            if path not in found:
                raise _unusable(model, inputs, path, found)
        if len(set(at)) < len(at):
            twice = next(path for path in at if list(at).count(path) > 1)
            raise RecipeError(f"early_exit.at names {twice!r} twice: one exit can sit there, remove one entry")
        chosen = sorted((found[path] for path in at), key=lambda place: place.order)
        for one, other in pairwise(chosen):
            if one.macs == other.macs:
                raise RecipeError(
                    f"early_exit.at: no MAC lies between {one.path!r} and {other.path!r}, so a second exit "
                    "there costs and saves nothing: remove one of them"
                )
        return chosen
    total = cost.count(model, inputs).macs
    return _nearest([p for p in found.values() if p.tokens is not None or not tokens], total, at_macs)


def _nearest(candidates: list[Place], total: int, at_macs: Sequence[float]) -> list[Place]:
    free = [place for place in candidates if 0 < place.macs <= LATEST * total]
    taken: list[Place] = []
    for share in at_macs:
        free = [place for place in free if all(place.macs != other.macs for other in taken)]
        if not free:
            break

        def key(place: Place, share: float = share) -> tuple[bool, int, float, int]:
            distance = abs(place.macs / total - share)
            depth = place.path.count(".") if distance <= _NEAR else 0
            return (distance > _NEAR, depth, distance, -place.order)

        taken.append(min(free, key=key))
    return sorted(taken, key=lambda place: place.order)


def _watch(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, _Seen]:
    """Runs one row in eval mode and notes the last output of every module, and which axis holds features."""
    seen: dict[str, _Seen] = {}
    clock = count()
    # shape -> feature axis, as the latest layer whose output has that shape implies it
    evidence: dict[tuple[int, ...], int] = {}

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _given: Any, output: Any) -> None:
            axis = 1
            if isinstance(output, Tensor):
                shape = tuple(output.shape)
                if isinstance(module, _FEATURES_FIRST):
                    evidence[shape] = 1
                elif isinstance(module, _FEATURES_LAST):
                    evidence[shape] = len(shape) - 1
                axis = evidence.get(shape, 2 if len(shape) == 3 else 1)
            runs = seen[path].runs if path in seen else 0
            seen[path] = _Seen(output, axis, next(clock), runs + 1)

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(leave(path)) for path, module in model.named_modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*(x[:1] for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return seen


def _unusable(
    model: nn.Module, inputs: tuple[Tensor, ...], path: str, found: dict[str, Place]
) -> RecipeError | StageError:
    """Why no exit can sit at `path`, and where it could instead."""
    seen = _watch(model, inputs)
    names = dict(model.named_modules())
    if path not in names or not path:
        close = difflib.get_close_matches(path, found, n=3, cutoff=0.3) or list(found)[:3]
        return RecipeError(
            f"early_exit.at: {type(model).__name__} has no module {path!r}; the nearest places for an exit are "
            f"{', '.join(map(repr, close))} (`edgewright cuts` lists all)"
        )
    if path not in seen:
        reason, order = "it does not run in forward", 0
    else:
        here = seen[path]
        reason, order = _reason(here), here.order
    near = sorted(found.values(), key=lambda place: (abs(place.order - order), place.order))[:3]
    return StageError(
        f"early_exit.at: no exit can sit at {path!r} ({type(names[path]).__name__}): {reason}; places near it are "
        f"{', '.join(repr(place.path) for place in near)} (`edgewright cuts` lists all)"
    )


def _reason(here: _Seen) -> str:
    output = here.output
    if here.runs > 1:
        return f"it runs {here.runs} times in one forward pass"
    if not isinstance(output, Tensor):
        return f"its output is a {type(output).__name__}, not one tensor"
    if not output.is_floating_point():
        return f"its output is {str(output.dtype).removeprefix('torch.')}, not float"
    if not 2 <= output.dim() <= 4:
        return f"its output has {output.dim()} axes, an exit reads 2 to 4"
    if output.shape[0] != 1:
        return f"the first axis of its output, {list(output.shape)} for one row, is not the batch"
    return "nothing is left to save after it, or its output does not depend on the batch"
