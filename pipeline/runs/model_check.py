"""Whether a model fits a task and can be exported: tried on real rows before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, TensorSpec
from edgewright.export.graph.capture import Outputs, quietly
from edgewright.export.graph.leaves import described, leaves_of
from edgewright.export.source import Answering, answers_of
from edgewright.models.layers.cached_step import CachedStep
from edgewright.models.sources.capturable import batched_experts
from edgewright.models.sources.module_state import copied, untouched
from edgewright.models.sources.pretrained import LogitsOnly
from edgewright.models.sources.python_source import place_of

from ..errors import ModelError
from ..task import Task, named_outputs, split_of
from ..training.model_output import wrapping
from .failing_module import Running, watched, where
from .row_answers import check_rows

_FIXES = (
    (
        "data-dependent",
        "Python `if`, `while`, `float()` and `.item()` on values of a tensor cannot become a graph: "
        "write them with tensor operations, e.g. torch.where",
    ),
    ("onstraints violated", "make forward work for any number of rows: x.shape[0] or flatten(1), not a fixed number"),
    ("numpy", "compute with torch inside forward, not with NumPy"),
)


@torch.no_grad()
def check_model(model: nn.Module, task: Task, name: str) -> None:
    """Runs two test rows through `model`.

    Raises:
        ModelError: it fails, with the module that did, or what it returns is no finite float32 [N, classes] tensor, any
            float32 [N, ...] for a task without classes; or a row is not answered always the same.
    """
    lazy = [key for key, value in model.named_parameters() if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"{name}: the parameter {lazy[0]!r} has no shape yet (a Lazy module); run the model once on an example "
            "in the function that builds it"
        )
    specs = answers_of(task)
    asked = model if all(spec.leaf is None for spec in specs) else _Flattened(model, specs).eval()
    check_rows(asked, first_rows(task), name, lambda inputs: _answer(model, task, inputs, name))


def _answer(model: nn.Module, task: Task, inputs: tuple[Tensor, ...], name: str) -> Tensor:
    """What `model` answers, if it is an answer for the task."""
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    running: Running = []
    try:
        with watched(model, running):
            output = model(*inputs)
    except Exception as error:  # a user's forward may raise anything, and it is the user who has to know
        raise ModelError(
            f"{name} does not run on the inputs of the task {task.name!r} ({shapes}): "
            f"{type(error).__name__}: {error}{where(running, error)}"
        ) from error
    rows, classes, specs = len(inputs[0]), len(task.labels), answers_of(task)
    if any(spec.leaf is not None for spec in specs):
        found = named_outputs(output, specs)
        for spec in specs:
            _check_answer(found if len(specs) == 1 else found[spec.name], spec, rows, name, task)
        return _flattened(output, specs)
    if not isinstance(output, Tensor):
        advice = wrapping(output, _in_training(model, inputs), rows, classes)
        raise ModelError(f"{name} returns {described(output)}; {advice}")
    declared = isinstance(task, Answering)
    if not declared and classes and (list(output.shape) != [rows, classes] or not output.is_floating_point()):
        raise ModelError(
            f"{name} returns {described(output)} for inputs {shapes}; the task {task.name!r} has {classes} labels, so "
            f"logits {[rows, classes]} are needed: set its number of classes under model.args, or correct the task's "
            "labels"
        )
    if output.dim() == 0 or len(output) != rows or not output.is_floating_point():
        raise ModelError(
            f"{name} returns {described(output)} for inputs {shapes}, and a float tensor with an answer for each of "
            f"the {rows} row(s) is needed, the rows in axis 0: return what the model computes before it is averaged, "
            "squeezed or turned into indices"
        )
    if output.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{name} returns {described(output)}: half precision is for the device's runtime to choose, the model is "
            "trained and compared in float32. Return `.float()`, and take autocast and `.half()` out of its forward"
        )
    if getattr(task, "vocabulary", None) is not None:
        # a tokenizer may have more tokens than the model, as long as the text has none of them
        largest = max(int(split.targets.max()) for split in task.splits.values())
        if largest >= output.shape[-1]:
            raise ModelError(
                f"{name} knows {output.shape[-1]} tokens, and the text of the task {task.name!r} has the token "
                f"{largest}: give the model's own tokenizer, `tokenizer_path` under task.args"
            )
    _check_answer(output, specs[0], rows, name, task)
    return output


def _check_answer(output: Tensor, spec: AnswerSpec, rows: int, name: str, task: Task) -> None:
    """Refuses a tensor that is not finite, or no answer of its kind."""
    if output.dim() == 0 or len(output) != rows or output.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{name} answers {spec.name!r} with {described(output)}, and a float32 tensor with an answer for each of "
            f"the {rows} row(s) is needed, the rows in axis 0"
        )
    tensor = TensorSpec(spec.name, "float32", tuple(output.shape))
    if isinstance(task, Answering) and (reason := kind_of(spec).unfit(spec, {spec.name: tensor})):
        raise ModelError(f"{name} does not fit the task {task.name!r}: {reason}; correct the model or the task")
    if not torch.isfinite(output).all():
        raise ModelError(
            f"{name} returns NaN or infinity for the first test rows: check its weights and the scale of the data"
        )


class _Flattened(nn.Module):
    """All answers of a model in one tensor, so that rows can be compared."""

    def __init__(self, model: nn.Module, specs: Sequence[AnswerSpec]) -> None:
        super().__init__()
        self.model, self.specs = model, specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Float [N, all]."""
        return _flattened(self.model(*inputs), self.specs)


def _flattened(output: Any, specs: Sequence[AnswerSpec]) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves_of(output, specs)], dim=1)


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
    failed = _export_failure(model, task, dynamic)
    if failed is None:
        return
    text = str(failed)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(failed).__name__)
    fix = next((advice for sign, advice in _FIXES if sign in text), "rewrite that line with tensor operations")
    if dynamic and _export_failure(model, task, dynamic=False) is None:
        fix += (
            ". Where forward compares the number of rows, or keeps what it made for it, `export.batch: single` does "
            "too: with one row a run this model exports as it is"
        )
    raise ModelError(
        f"{name} could be trained, but not exported{place_of(failed)}: {type(failed).__name__}: {line[:300]}. "
        f"What helps: {fix}"
    ) from failed


def _export_failure(model: nn.Module, task: Task, dynamic: bool) -> Exception | None:
    """What torch.export says against the model, None if it takes it."""
    inputs = _example(task, 2 if dynamic else 1)
    axes = [{a: n for a, n in given.items() if dynamic or a != 0} for given in task.dynamic_axes]
    shapes = (tuple(dict.fromkeys(given, torch.export.Dim.DYNAMIC) for given in axes),)
    first: Exception | None = None
    # the exporter goes the same two ways; the second, slower one understands more Python
    for strict in (False, True):
        try:
            with quietly(), _silent(), untouched(model), batched_experts(model), torch.no_grad():
                wrapper = Outputs(model, answers_of(task)).eval()
                wrapper(*inputs)
                torch.export.export(wrapper, inputs, dynamic_shapes=shapes if any(axes) else None, strict=strict)
            return None
        except Exception as error:  # torch.export raises errors of many kinds
            first = first or error
    return first


def _in_training(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What a copy returns in training mode; None where it cannot be copied or fails, which is not the question here."""
    try:
        return copied(model).train()(*inputs)
    except Exception as error:  # a user's forward may raise anything
        logging.getLogger(__name__).debug("no forward in training mode: %s", error)
        return None


def first_rows(task: Task) -> tuple[Tensor, ...]:
    """Inputs of the first two test rows, or of the only one."""
    split = split_of(task, "test", needed_by="the report")
    return split.batch(list(range(min(2, len(split))))).inputs


def _example(task: Task, rows: int) -> tuple[Tensor, ...]:
    split = split_of(task, "test", needed_by="the report")
    return split.batch([i % len(split) for i in range(rows)]).inputs


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps torch's tracing from logging graphs: the failure is told in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
