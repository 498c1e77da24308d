"""Whether a model fits a task and can be exported: tried on real rows before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgewright.export.capture import HeadLogits, quietly
from edgewright.models.cached_step import CachedStep
from edgewright.models.pretrained import LogitsOnly
from edgewright.models.python_source import place_of

from .errors import ModelError
from .model_output import described, wrapping
from .task import Task, split_of

_FIXES = (
    (
        "data-dependent",
        "Python `if`, `while`, `float()` and `.item()` on values of a tensor cannot become a graph: "
        "write them with tensor operations, e.g. torch.where",
    ),
    ("onstraints violated", "make forward work for any number of rows: x.shape[0] or flatten(1), not a fixed number"),
    ("numpy", "compute with torch inside forward, not with NumPy"),
)
_ALONE = 1e-3  # of the largest answer; float32 is off by a hundredth of that


@torch.no_grad()
def check_model(model: nn.Module, task: Task, name: str) -> None:
    """Runs two test rows through `model`.

    Raises:
        ModelError: it fails, with the module that did, or what it returns is no finite float [N, classes] tensor, any
            float [N, ...] for a task without classes; or a row is answered otherwise alone.
    """
    lazy = [key for key, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"{name}: the parameter {lazy[0]!r} has no shape yet (a Lazy module); run the model once on an example "
            "in the function that builds it"
        )
    inputs = first_rows(task)
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    running: list[tuple[str, nn.Module, Any]] = []
    try:
        with _watched(model, running):
            output = model(*inputs)
    except Exception as error:  # a user's forward may raise anything, and it is the user who has to know
        raise ModelError(
            f"{name} does not run on the inputs of the task {task.name!r} ({shapes}): "
            f"{type(error).__name__}: {error}{_where(running, error)}"
        ) from error
    wanted = [len(inputs[0]), len(task.labels)] if task.labels else [len(inputs[0]), *_axes_beyond(output)]
    if not isinstance(output, Tensor):
        raise ModelError(f"{name} returns {described(output)}; {wrapping(output, wanted)}")
    if list(output.shape) != wanted or not output.is_floating_point():
        raise ModelError(
            f"{name} returns {str(output.dtype).removeprefix('torch.')} {list(output.shape)} for inputs {shapes}; "
            f"the task {task.name!r} has {len(task.labels)} labels, so logits {wanted} are needed: set its number of "
            "classes under model.args, or correct the task's labels"
        )
    if getattr(task, "vocabulary", None) is not None:
        # a tokenizer may have more tokens than the model, as long as the text has none of them
        largest = max(int(split.targets.max()) for split in task.splits.values())
        if largest >= output.shape[-1]:
            raise ModelError(
                f"{name} knows {output.shape[-1]} tokens, and the text of the task {task.name!r} has the token "
                f"{largest}: give the model's own tokenizer, `tokenizer_path` under task.args"
            )
    if not torch.isfinite(output).all():
        raise ModelError(
            f"{name} returns NaN or infinity for the first test rows: check its weights and the scale of the data"
        )
    if len(output) > 1:
        _check_alone(model, tuple(x[:1] for x in inputs), output[:1], name)


def _check_alone(model: nn.Module, row: tuple[Tensor, ...], beside: Tensor, name: str) -> None:
    """Holds what a row is answered alone to what it was answered beside another, `beside`, [1, ...]."""
    try:
        alone = model(*row)
    except Exception as error:  # as above
        raise ModelError(
            f"{name} runs on two rows and not on one{place_of(error)}: {type(error).__name__}: {error}. It could be "
            "trained, but not exported: make forward work for any number of rows"
        ) from error
    if alone.shape != beside.shape:
        raise ModelError(
            f"{name} answers one row with {list(alone.shape)}, and {list(beside.shape)} is needed: squeeze() without "
            "an axis takes the axis of the rows too when there is one row, name the axis"
        )
    off = float((alone - beside).abs().max()) if alone.numel() else 0.0
    if off > _ALONE * (1.0 + float(beside.abs().max() if beside.numel() else 0.0)):
        raise ModelError(
            f"{name} answers a row otherwise when another is beside it (off by {off:.3g}), in eval mode: something "
            "mixes the rows of a batch, e.g. a BatchNorm without running statistics or one that is kept in training "
            "mode. Normalise with running statistics, or with LayerNorm or GroupNorm, which take each row by itself"
        )


@torch.no_grad()
def check_generates(model: nn.Module, task: Task, name: str) -> None:
    """Runs a language model once with its cache, as a generator will.

    Raises:
        ModelError: it has none, or the task gives no texts to prove it on.
    """
    rows = len(split_of(task, "test", needed_by="the proof of a generator"))
    tokens = _example(task, min(rows, 3))[0]
    try:
        if not isinstance(model, LogitsOnly):
            raise ValueError("it is no model of the transformers library (hf:, gguf:, packaged:)")
        step = CachedStep(model)
        with torch.no_grad():
            step(tokens[:, :2], torch.ones_like(tokens[:, :2]), *step.empty_past(len(tokens)))
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ModelError(f"export.generator: {name} cannot generate: {error}; set export.generator to false") from error
    if rows < 3:
        raise ModelError(f"export.generator: the proof needs 3 windows of the test split, and there are {rows}")


def check_exportable(model: nn.Module, task: Task, name: str, dynamic: bool) -> None:
    """Lets torch.export read the model once, as the export will at the end; under a second for small models.

    Args:
        model: in eval mode; unchanged.
        task: gives two test rows, and the axes that may vary.
        name: as the recipe calls it.
        dynamic: whether the number of rows is to stay open.

    Raises:
        ModelError: names the line of the model that stands in the way, and what helps.
    """
    inputs = _example(task, 2 if dynamic else 1)
    axes = [{a: n for a, n in given.items() if dynamic or a != 0} for given in task.dynamic_axes]
    shapes = (tuple(dict.fromkeys(given, torch.export.Dim.DYNAMIC) for given in axes),)
    first: Exception | None = None
    # the exporter goes the same two ways; the second, slower one understands more Python
    for strict in (False, True):
        try:
            with quietly(), _silent():
                torch.export.export(
                    HeadLogits(model).eval(), inputs, dynamic_shapes=shapes if any(axes) else None, strict=strict
                )
            return
        except Exception as error:  # torch.export raises errors of many kinds
            first = first or error
    assert first is not None
    text = str(first)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(first).__name__)
    fix = next((advice for sign, advice in _FIXES if sign in text), "rewrite that line with tensor operations")
    raise ModelError(
        f"{name} could be trained, but not exported{place_of(first)}: {type(first).__name__}: {line[:300]}. "
        f"What helps: {fix}"
    ) from first


def _axes_beyond(output: Any) -> list[int]:
    """Of a task without classes, every axis after the first may be as the model gives it."""
    return list(output.shape[1:]) if isinstance(output, Tensor) and output.dim() > 1 else [1]


def first_rows(task: Task) -> tuple[Tensor, ...]:
    """Inputs of the first two test rows, or of the only one."""
    split = split_of(task, "test", needed_by="the report")
    return split.batch(list(range(min(2, len(split))))).inputs


def _example(task: Task, rows: int) -> tuple[Tensor, ...]:
    split = split_of(task, "test", needed_by="the report")
    return split.batch([i % len(split) for i in range(rows)]).inputs


@contextmanager
def _watched(model: nn.Module, running: list[tuple[str, nn.Module, Any]]) -> Iterator[None]:
    """Keeps in `running` the modules that are inside their forward, the innermost last."""

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


def _where(running: Sequence[tuple[str, nn.Module, Any]], error: Exception) -> str:
    """The module that failed, what it was given, and what the user can do about it."""
    if not running or not running[-1][0]:
        return place_of(error)
    path, module, given = running[-1]
    kind = f"{type(module).__name__}({module.extra_repr()})"
    shapes = ", ".join(str(list(x.shape)) for x in given if isinstance(x, Tensor))
    return f". It failed in {path!r}, {kind}, which was given {shapes}{_advice(module, given)}"


def _advice(module: nn.Module, given: Sequence[Any]) -> str:
    x = given[0] if given else None
    if not isinstance(x, Tensor):
        return ""
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


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps torch's tracing from logging graphs: the failure is told in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
