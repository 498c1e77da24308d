"""A language model as one ONNX file that generates: tokens, a mask and the cache in, logits and the longer cache out.

The same file prefills, continues and decodes: batch, new tokens and past tokens are dynamic axes. The cache is plain
inputs and outputs, ``past.<layer>.key`` and ``present.<layer>.key`` and so on, ``[N, heads, tokens, width]``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from torch import Tensor

from edgewright.edge_runtime.errors import ExportError, InputError, ParityError
from edgewright.edge_runtime.generation import Generator
from edgewright.edge_runtime.manifest import LOGITS, MODEL_FILE
from edgewright.models.cached_step import CachedStep
from edgewright.models.pretrained import LogitsOnly

from .capture import explain, first_names, name_axes, name_everything, quietly
from .ledger import stored_bytes, torch_unique_bytes
from .model_file import data_file, save_model
from .options import ExportOptions
from .simplify import simplify

_STORED_LIMIT = 1.01
"""Weight bytes of the file over those of PyTorch's storages."""


@dataclass(frozen=True)
class GeneratorExport:
    """A written file, and what proved it.

    Attributes:
        path: of model.onnx.
        max_abs_diff: largest difference of a logit, over all steps of all cases.
        steps: decode steps that were compared, each for every row.
        weight_bytes: stored in the file.
        torch_bytes: unique storages of the PyTorch model.
        note: what the simplifier said.
    """

    path: Path
    max_abs_diff: float
    steps: int
    weight_bytes: int
    torch_bytes: int
    note: str


def export_generator(
    model: LogitsOnly,
    tokens: Tensor,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    decode_steps: int = 64,
    tolerance: float = 1e-3,
) -> GeneratorExport:
    """Exports `model` with its cache into the folder `out`, after the file has proven that it computes the same.

    The proof does not use PyTorch's cache: every row is run by itself, unpadded and whole, and must have the logits
    that the file gives for it in a padded batch, prefilled in two chunks and then decoded greedily, token by token.

    Args:
        model: a causal language model, factorized or not; on the CPU, in eval mode.
        tokens: int64 [at least 3, T], T at least 4: prompts of the proof; rows are cut to different lengths.
        out: folder, made when needed; files in it are replaced one by one.
        options: opset and simplifier.
        decode_steps: tokens that the proof generates.
        tolerance: largest allowed difference of a logit.

    Raises:
        ExportError: torch cannot export it, or the file stores a weight twice.
        ParityError: the file answers differently; nothing is written.
        InputError: too few prompts, or `out` is a file.
    """
    options = options or ExportOptions()
    if len(tokens) < 3 or tokens.shape[1] < 4:
        raise InputError(f"prompts {list(tokens.shape)} are too few: give at least 3 of at least 4 tokens")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is in the way: name a folder")
    try:
        step = CachedStep(model).eval()
    except ValueError as error:
        raise ExportError(str(error)) from error
    raw, feeds = _captured(step, tokens, options)
    # what reads one basis multiplies it once, also where the simplifier's result is not kept: it folds the
    # transposition of an embedding that is the head too, which would store it twice
    ir.passes.common.CommonSubexpressionEliminationPass()(raw)
    final, note = simplify(
        raw, options.simplify, feeds, abs_tolerance=options.tolerance.abs, rel_tolerance=options.tolerance.rel
    )
    stored, unique = stored_bytes(final), torch_unique_bytes(model)
    if stored > unique * _STORED_LIMIT:
        raise ExportError(
            f"the file would store {stored} weight bytes, the PyTorch model {unique}: a shared weight was duplicated; "
            "set simplify to none, and please report it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".generator-", dir=folder) as aside:
        path = Path(aside, MODEL_FILE)
        save_model(final, path)
        # ids that a random text holds; the first rows alone and three together
        worst = max(
            _largest_difference(model, path, [tokens[0]], decode_steps, tolerance),
            _largest_difference(model, path, [tokens[0], tokens[1, :-1], tokens[2, 1:-1]], decode_steps, tolerance),
        )
        for made in (path, data_file(path)):
            if made.exists():
                made.replace(folder / made.name)
    return GeneratorExport(folder / MODEL_FILE, worst, decode_steps, stored, unique, note)


def _captured(step: CachedStep, tokens: Tensor, options: ExportOptions) -> tuple[ir.Model, dict[str, np.ndarray]]:
    with torch.no_grad():
        first = tokens[:2, :3]
        past = step(first, torch.ones_like(first), *step.empty_past(2))[1:]
    rest = tokens[:2, 2:4]
    inputs = (rest, torch.ones(2, 5, dtype=torch.int64), *past)
    kinds = [f"{i // 2}.{'value' if i % 2 else 'key'}" for i in range(len(past))]
    axes: list[Mapping[int, str]] = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}]
    axes += [{0: "batch", 2: "past"}] * len(past)
    names = ["input_ids", "attention_mask", *(f"past.{kind}" for kind in kinds)]
    dynamic = [dict.fromkeys(given, torch.export.Dim.DYNAMIC) for given in axes]
    try:
        with quietly(), torch.no_grad():
            program = torch.onnx.export(
                step,
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                input_names=names,
                output_names=[LOGITS, *(f"present.{kind}" for kind in kinds)],
                dynamic_shapes=(dynamic[0], dynamic[1], tuple(dynamic[2:])),
                opset_version=options.opset,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(explain(step.model.model, error)) from error
    assert program is not None
    captured: ir.Model = program.model
    name_axes(captured.graph, axes)
    name_everything(captured.graph, first_names(step.model))
    captured.metadata_props.clear()
    captured.doc_string = None
    captured.graph.name, captured.producer_name, captured.producer_version = "main", "edgewright", ""
    return captured, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}


@torch.no_grad()
def _largest_difference(model: LogitsOnly, path: Path, prompts: list[Tensor], steps: int, tolerance: float) -> float:
    """Runs `prompts` through the file as a batch, and every row of PyTorch by itself over what the file generated."""
    generator = Generator(path, threads=1)
    half = [prompt[: len(prompt) // 2] for prompt in prompts]
    rest = [prompt[len(prompt) // 2 :].tolist() for prompt in prompts]
    if len({len(r) for r in rest}) > 1:  # a second chunk cannot be padded: the cache lies before it
        half, rest = prompts, []
    logits = generator.prefill([prompt.tolist() for prompt in half])
    seen = [logits[row : row + 1, -len(prompt) :] for row, prompt in enumerate(half)]
    if rest and rest[0]:
        more = generator.step(np.asarray(rest, np.int64))
        seen = [np.concatenate([old, more[row : row + 1]], axis=1) for row, old in enumerate(seen)]
    written: list[list[int]] = [prompt.tolist() for prompt in prompts]
    for _ in range(steps):
        following = [int(old[0, -1].argmax()) for old in seen]
        more = generator.step(np.asarray(following, np.int64)[:, None])
        seen = [np.concatenate([old, more[row : row + 1]], axis=1) for row, old in enumerate(seen)]
        written = [[*row, token] for row, token in zip(written, following, strict=True)]
    worst = 0.0
    for row, ids in enumerate(written):
        expected = model(torch.tensor([ids]))
        worst = max(worst, float(np.abs(expected.numpy() - seen[row]).max()))
        length = len(prompts[row])
        chosen = expected[0, length - 1 : -1].argmax(dim=-1).tolist()
        near = expected[0, length - 1 : -1].topk(2, dim=-1).values
        for at, (mine, other) in enumerate(zip(ids[length:], chosen, strict=True)):
            if mine != other and float(near[at, 0] - near[at, 1]) > 2 * tolerance:
                raise ParityError(f"decode step {at} of row {row}: the file chose token {mine}, PyTorch {other}")
    if not worst <= tolerance:
        raise ParityError(f"logits of the file differ from PyTorch's by {worst:.3g}, more than {tolerance:g}")
    return worst
