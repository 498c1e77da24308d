"""A language model as one ONNX file that generates: tokens, a mask and the cache in, logits and the longer cache out.

The same file prefills, continues and decodes: batch, new tokens and past tokens are dynamic axes. The cache is plain
inputs and outputs, ``past.<layer>.key`` and ``present.<layer>.key`` and so on, ``[N, heads, tokens, width]``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.archive import write_runtime_archive
from edgewright.edge_runtime.bundle.bundle import pack_zip, write_manifest
from edgewright.edge_runtime.bundle.golden import write_golden
from edgewright.edge_runtime.bundle.manifest import (
    END_TOKENS,
    GOLDEN_FILE,
    LOGITS,
    MODEL_FILE,
    PAST,
    POSITIONS,
    POSITIONS_REASON,
    PRESENT,
    RUNTIME_FILE,
    TOKENIZER_FILE,
    Manifest,
)
from edgewright.edge_runtime.errors import ExportError, InputError, ParityError
from edgewright.edge_runtime.language.generation import Generator
from edgewright.models.layers.cached_step import CachedStep
from edgewright.models.sources.capturable import batched_experts, fixed_rotary
from edgewright.models.sources.module_state import untouched
from edgewright.models.sources.pretrained import LogitsOnly

from ..accounts.ledger import build_ledger, stored_bytes, torch_unique_bytes
from ..bundle_folder import check_target, put_in_place, scratch, writing
from ..graph.capture import explain, first_names, name_axes, name_everything, quietly
from ..graph.model_file import EXTERNAL_ABOVE, check_file, save_model
from ..graph.simplify import simplify
from ..options import ExportOptions
from ..precision.weight_quantization import Quantization, quantize_weights
from ..target import held_to
from .answered_positions import choose_positions
from .reach import claimed_positions, proven_reach
from .record import cache_names, golden_cases, manifest_of

_PROMPT = 16
"""Tokens of a prompt of the proof."""

_STORED_LIMIT = 1.01
"""Weight bytes of the file over those of PyTorch's storages."""


@dataclass(frozen=True)
class GeneratorExport:
    """A written bundle, and what proved it.

    Attributes:
        path: of model.onnx.
        manifest: as written.
        max_abs_diff: largest difference of a logit to PyTorch's float32, over all steps of all cases.
        steps: decode steps that were compared, each for every row.
        weight_bytes: stored in the file.
        torch_bytes: unique storages of the PyTorch model.
        note: what the simplifier said.
        quantization: what rounding the weights did; None if they are float32.
    """

    path: Path
    manifest: Manifest
    max_abs_diff: float
    steps: int
    weight_bytes: int
    torch_bytes: int
    note: str
    quantization: Quantization | None


def export_generator(
    model: LogitsOnly,
    tokens: Tensor,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    decode_steps: int = 64,
    tolerance: float = 1e-3,
    name: str = "generator",
    edits: Sequence[Mapping[str, Any]] = (),
    tokenizer: str | None = None,
    external_above: int = EXTERNAL_ABOVE,
) -> GeneratorExport:
    """Exports `model` with its cache as the bundle `out`, after the file has proven that it computes the same.

    The proof does not use PyTorch's cache: every row is run by itself, unpadded and whole, and must have the logits
    that the file gives for it in a padded batch, prefilled in two chunks and then decoded greedily, token by token.
    A long text follows, past every length at which the configuration changes something: the file is claimed as far as
    it is right there, and says why where that is shorter than the model's context.
    Rounded weights are rounded after that proof; what they change is measured, and stands in the manifest.

    Args:
        model: a causal language model, factorized or not; on the CPU, in eval mode.
        tokens: int64 [at least 3, T], T at least 4: texts; the proof's prompts are their beginnings, cut to different
            lengths, and the first row is what MACs are counted for.
        out: folder of the bundle; replaced if it is a bundle already.
        options: opset, simplifier, `weights`, `proof_tokens` and zip.
        decode_steps: tokens that the proof generates; fewer where the model has no positions for them.
        tolerance: largest allowed difference of a logit.
        name: of the bundle.
        edits: what the stages did, for the manifest.
        tokenizer: content of a tokenizer.json, which goes into the bundle.
        external_above: bytes of weights above which they go to ``model.onnx.data``.

    Raises:
        ExportError: torch cannot export it, or the file stores a weight twice.
        ParityError: the file answers differently; nothing is written.
        InputError: too few prompts, or `out` is something else than a bundle, or cannot be written.
    """
    options = options or ExportOptions()
    if len(tokens) < 3 or tokens.shape[1] < 4:
        raise InputError(f"prompts {list(tokens.shape)} are too few: give at least 3 of at least 4 tokens")
    target = Path(out)
    check_target(target)
    try:
        step = CachedStep(model).eval()
    except ValueError as error:
        raise ExportError(str(error)) from error
    raw, final, note = _graphs(step, tokens, options)
    if not choose_positions(final.graph):
        note = f"{note}; a prompt gets logits at all its tokens: the graph does not end in a product with fixed weights"
    positions, reason = claimed_positions(model, options.proof_tokens)
    final.metadata_props[END_TOKENS] = json.dumps(model.end_tokens)
    _claim(final, positions, reason)
    with scratch(target) as folder:
        work = folder / "bundle"
        work.mkdir()
        path = work / MODEL_FILE
        with writing(target):
            save_model(final, path, external_above)
        check_file(path)
        prompts = tokens[:3, :_PROMPT]
        decode_steps = max(0, min(decode_steps, (positions or sys.maxsize) - prompts.shape[1]))
        # the first row alone, and three of different lengths
        batches = [[prompts[0]], [prompts[0], prompts[1, :-1], prompts[2, 1:-1]]]
        worst = _largest_difference(model, path, batches, decode_steps, tolerance)
        reach = proven_reach(model, path, tokens, options.proof_tokens, tolerance)
        if reach.positions != positions:
            _claim(final, reach.positions, reach.reason)
            with writing(target):
                save_model(final, path, external_above)
        worst = max(worst, reach.max_abs_diff)
        written, quantization = final, None
        if options.weights != "float32":
            quantization = quantize_weights(model, path, options.weights, prompts, external_above)
            written = ir.load(path)
        cases = golden_cases(step, path, batches)
        manifest = manifest_of(
            step, final, written, path, tokens[:1], cases, build_ledger(model, raw, written, None, copies=False),
            tolerance=tolerance, max_abs_diff=worst, quantization=quantization,
            notes=(note, reach.text(), *((quantization.text(),) if quantization else ())),
        )  # fmt: skip
        manifest = held_to(options.target, dataclasses.replace(manifest, name=name, edits=tuple(edits)))
        with writing(target):
            if tokenizer is not None:
                (work / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
            write_golden(work / GOLDEN_FILE, cases)
            write_runtime_archive(work / RUNTIME_FILE)
            manifest = write_manifest(work, manifest)
            put_in_place(work, target)
    if options.zip:
        with writing(target):
            pack_zip(target, target.with_name(f"{target.name}.zip"))
    sizes = manifest.ledger.stored_weight_bytes, manifest.ledger.torch_unique_bytes
    return GeneratorExport(target / MODEL_FILE, manifest, worst, decode_steps, *sizes, note, quantization)


def _claim(model: ir.Model, positions: int | None, reason: str) -> None:
    model.metadata_props[POSITIONS] = json.dumps(positions)
    model.metadata_props.pop(POSITIONS_REASON, None)
    if reason:
        model.metadata_props[POSITIONS_REASON] = reason


def _graphs(step: CachedStep, tokens: Tensor, options: ExportOptions) -> tuple[ir.Model, ir.Model, str]:
    """The fresh capture, the simplified graph, and what the simplifier said.

    Raises:
        ExportError: torch cannot export it, or a weight is stored twice.
    """
    raw, feeds = _captured(step, tokens, options)
    # what reads one basis multiplies it once, also where the simplifier's result is not kept: it folds the
    # transposition of an embedding that is the head too, which would store it twice
    ir.passes.common.CommonSubexpressionEliminationPass()(raw)
    final, note = simplify(
        raw, options.simplify, feeds, abs_tolerance=options.tolerance.abs, rel_tolerance=options.tolerance.rel
    )
    stored, unique = stored_bytes(final), torch_unique_bytes(step.model)
    if stored > unique * _STORED_LIMIT:
        raise ExportError(
            f"the file would store {stored} weight bytes, the PyTorch model {unique}: a shared weight was duplicated; "
            "set simplify to none, and please report it"
        )
    return raw, final, note


def _captured(step: CachedStep, tokens: Tensor, options: ExportOptions) -> tuple[ir.Model, dict[str, np.ndarray]]:
    with torch.no_grad():
        first = tokens[:2, :3]
        past = step(first, torch.ones_like(first), *step.empty_past(2))[1:]
    rest = tokens[:2, 2:4]
    inputs = (rest, torch.ones(2, 5, dtype=torch.int64), *past)
    kinds = cache_names(len(past) // 2)
    axes: list[Mapping[int, str]] = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}]
    axes += [{0: "batch", 2: "past"}] * len(past)
    names = ["input_ids", "attention_mask", *(PAST + kind for kind in kinds)]
    dynamic = [dict.fromkeys(given, torch.export.Dim.DYNAMIC) for given in axes]
    try:
        with quietly(), torch.no_grad(), untouched(step), batched_experts(step), fixed_rotary(step):
            program = torch.onnx.export(
                step,
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                input_names=names,
                output_names=[LOGITS, *(PRESENT + kind for kind in kinds)],
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
def _largest_difference(
    model: LogitsOnly, path: Path, batches: Sequence[Sequence[Tensor]], steps: int, tolerance: float
) -> float:
    """Runs every batch of prompts through the file, and every row of PyTorch by itself over what the file generated."""
    generator = Generator(path, threads=1)
    done: dict[tuple[int, ...], Tensor] = {}
    worst = 0.0
    for prompts in batches:
        last = np.array(generator.prefill([prompt.tolist() for prompt in prompts], last_only=True))
        written, seen = _continued(generator, prompts, steps)
        for row, ids in enumerate(written):
            if tuple(ids) not in done:
                done[tuple(ids)] = model(torch.tensor([ids]))
            expected = done[tuple(ids)]
            worst = max(worst, float(np.abs(expected.numpy() - seen[row]).max()))
            length = len(prompts[row])
            worst = max(worst, float(np.abs(expected[0, length - 1].numpy() - last[row, 0]).max()))
            chosen = expected[0, length - 1 : -1].argmax(dim=-1).tolist()
            near = expected[0, length - 1 : -1].topk(2, dim=-1).values
            for at, (mine, other) in enumerate(zip(ids[length:], chosen, strict=True)):
                if mine != other and float(near[at, 0] - near[at, 1]) > 2 * tolerance:
                    raise ParityError(f"decode step {at} of row {row}: the file chose token {mine}, PyTorch {other}")
    if not worst <= tolerance:
        raise ParityError(f"logits of the file differ from PyTorch's by {worst:.3g}, more than {tolerance:g}")
    return worst


def _continued(
    generator: Generator, prompts: Sequence[Tensor], steps: int
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """`prompts` with `steps` greedy tokens each, and the logits [1, T, V] that the file gave at all their places."""
    half = [prompt[: len(prompt) // 2] for prompt in prompts]
    rest = [prompt[len(prompt) // 2 :].tolist() for prompt in prompts]
    if len({len(r) for r in rest}) > 1:  # a second chunk cannot be padded: the cache lies before it
        half, rest = list(prompts), []
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
    return written, seen
