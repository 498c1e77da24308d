"""Which module of a model failed on given inputs, what it was given, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from edgewright.models.sources.python_source import place_of

Running: TypeAlias = list[tuple[str, nn.Module, Any]]
"""Path, module and inputs of every module that is inside its forward, the innermost last."""

_ONE_VALUE = "Expected more than 1 value per channel"
_ONE_POSITION = "Expected more than 1 spatial element"


@contextmanager
def watched(model: nn.Module, running: Running) -> Iterator[None]:
    """Keeps `running` up to date; after an error the module that failed is its last entry."""

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            running.append((path, module, given))

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where(running: Running, error: Exception) -> str:
    """The module that failed, what it was given, and what the user can do about it."""
    if not running or not running[-1][0]:
        return place_of(error)
    path, module, given = running[-1]
    kind = f"{type(module).__name__}({module.extra_repr()})"
    shapes = ", ".join(str(list(x.shape)) for x in given if isinstance(x, Tensor))
    return f". It failed in {path!r}, {kind}, which was given {shapes}{_advice(module, given, str(error))}"


def normalises_one_value(error: Exception) -> bool:
    """Whether a batch norm, or another norm over rows, was given one row with one value per channel."""
    return _ONE_VALUE in str(error)


def _advice(module: nn.Module, given: Sequence[Any], text: str) -> str:
    x = given[0] if given else None
    if not isinstance(x, Tensor):
        return ""
    if _ONE_POSITION in text or (_ONE_VALUE in text and not isinstance(module, nn.modules.batchnorm._BatchNorm)):
        return (
            ": one number is left per channel, and normalised alone it is always 0; leave this norm out there, "
            "normalise before the map is pooled away, or give larger inputs"
        )
    if _ONE_VALUE in text:
        return ": with one value per channel there is nothing to normalise by; it takes two rows or more"
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and x.dim() == len(module.kernel_size) + 2
    if convolution and x.shape[1] != module.in_channels:
        return (
            f": it takes {module.in_channels} channels and the data has {x.shape[1]}: give the images that many "
            "(`channels` under task.args, where the task has it), or build the model for the data's"
        )
    if isinstance(module, nn.Embedding) and not x.is_floating_point() and int(x.max()) >= module.num_embeddings:
        return (
            f": it has {module.num_embeddings} rows and the data the number {int(x.max())}: if these are tokens, give "
            "the model's own tokenizer (`tokenizer_path` under task.args), and no more of them than it has positions"
        )
    if isinstance(module, nn.Linear) and x.shape[-1] != module.in_features:
        return (
            f": it takes {module.in_features} features and gets {x.shape[-1]}: the size of the inputs (`size` under "
            "task.args, where the task has it) is not the one the model was made for"
        )
    return ": change the size of the inputs, or the model"
