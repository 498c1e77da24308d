"""Keys of a weights file that was saved out of a wrapper, and the one mapping that makes all of them the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch's wrappers (DataParallel, compile, FSDP, activation checkpoints) put into the names, anywhere."""

_COUNTERS = ("n_averaged",)
"""What torch's wrappers keep beside the weights."""


@dataclass(frozen=True)
class Mapped:
    """A state dict under the model's keys.

    Attributes:
        state: as the model names it.
        notes: how it was mapped, for the user; empty where the names were the model's.
    """

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def mapped(
    state: Mapping[str, Tensor], own: Sequence[str], fits: Callable[[Mapping[str, Tensor]], bool]
) -> Mapped | None:
    """The state dict under the keys `own`, by the first mapping that fits all of its keys; None if there is none.

    Tried are the keys as they are; without the names of wrappers, in the middle too; and with one prefix for another.

    Args:
        state: as it was saved.
        own: the model's keys.
        fits: whether a state dict can be loaded as it is.
    """
    if fits(state):
        return Mapped(dict(state))
    counters = [key for key in _COUNTERS if key in state and key not in own]
    notes = tuple(f"{key!r} was left out, which is no weight" for key in counters)
    state = {key: value for key, value in state.items() if key not in counters}
    if state and counters and fits(state):
        return Mapped(state, notes)
    places = _by_path(own)
    if places is None:
        return None
    for without, paths in _candidates(list(state), list(places)):
        keys = [places.get(path) for path in paths]
        if len(set(keys)) < len(keys):
            continue
        # a key of no place stays, under the name that it would have, so that `fits` sees it
        found = {new or ".".join(path): value for new, path, value in zip(keys, paths, state.values(), strict=True)}
        if fits(found):
            return Mapped(found, (f"its keys were read {without}", *notes))
    return None


def _by_path(own: Sequence[str]) -> dict[tuple[str, ...], str] | None:
    """The model's keys by their names without wrappers; None if that makes two of them one."""
    found = {_unwrapped(key): key for key in own}
    return found if len(found) == len(own) else None


def _unwrapped(key: str) -> tuple[str, ...]:
    return tuple(part for part in key.split(".") if part not in WRAPPERS)


def _candidates(given: Sequence[str], own: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """What is done to the keys, in words, and their paths in the model after that."""
    paths = [_unwrapped(key) for key in given]
    wrappers = [name for name in WRAPPERS if any(name in key.split(".") for key in given)]
    unwrapped = [f"without {name + '.'!r}" for name in wrappers]
    theirs, ours = _common_start(paths), _common_start(own)
    for taken in range(len(theirs) + 1):
        for put in range(len(ours) + 1):
            said = list(unwrapped)
            if taken:
                said.append(f"without the prefix {'.'.join(theirs[:taken]) + '.'!r}")
            if put:
                said.append(f"with the prefix {'.'.join(ours[:put]) + '.'!r} before them")
            yield " and ".join(said) or "without the model's wrappers", [(*ours[:put], *p[taken:]) for p in paths]


def _common_start(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """What all paths begin with; their last names, which are the tensors', are no part of it."""
    start: list[str] = []
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        start.append(parts[0])
    return tuple(start)
