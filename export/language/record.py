"""What the bundle of a generator says about itself: its manifest, and runs that a device can hold it to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.answers.kind import LABEL_DIFFERS
from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.answers.tokens import TOKENS
from edgewright.edge_runtime.bundle.manifest import (
    LOGITS,
    PAST,
    PRESENT,
    AnswerSpec,
    GoldenCase,
    Ledger,
    Manifest,
    ParityReport,
    Preprocessing,
    Tolerances,
)
from edgewright.edge_runtime.inference.feeds import specs_of
from edgewright.edge_runtime.inference.session import session_on
from edgewright.edge_runtime.proof.comparison import compare
from edgewright.edge_runtime.versions import versions
from edgewright.models.layers.cached_step import CachedStep

from ..accounts.node_table import exit_specs, flat_costs, node_table, uncounted
from ..bundle_folder import DISTRIBUTIONS
from ..precision.weight_quantization import Quantization

_MARGIN = 2.0
"""What a device's logits may differ from PyTorch's by, over what rounded weights did at export."""


def cache_names(layers: int) -> list[str]:
    """``<layer>.key`` and ``<layer>.value`` in turn."""
    return [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


@torch.no_grad()
def golden_cases(step: CachedStep, path: Path, batches: Sequence[Sequence[Tensor]]) -> list[GoldenCase]:
    """For every batch of prompts, padded on the left: the prefill, and one token after it.

    Where rows are padded, only the token after it: what a prefill gives at padding means nothing, and differs from one
    runtime to the next.

    Args:
        step: the PyTorch model.
        path: the exported file.
        batches: prompts, int64 [T] each.
    """
    session = session_on(path, threads=1)
    cases = []
    for prompts in batches:
        longest = max(len(prompt) for prompt in prompts)
        ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        past = step.empty_past(len(prompts))
        padded = bool((mask == 0).any())
        for prefill in (True, False):
            names = cache_names(len(past) // 2)
            feeds = {
                "input_ids": ids,
                "attention_mask": mask,
                **{PAST + n: x for n, x in zip(names, past, strict=True)},
            }
            arrays = {name: np.ascontiguousarray(x.numpy()) for name, x in feeds.items()}
            logits, *present = step(ids, mask, *past)
            expected = {LOGITS: logits, **{PRESENT + n: x for n, x in zip(names, present, strict=True)}}
            if not (prefill and padded):
                wanted = {name: x.numpy() for name, x in expected.items()}
                cases.append(GoldenCase(arrays, wanted, dict(session.run(arrays))))
            ids, past = logits[:, -1:].argmax(dim=-1), tuple(present)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return cases


def manifest_of(
    step: CachedStep,
    flat: ir.Model,
    written: ir.Model,
    path: Path,
    row: Tensor,
    cases: Sequence[GoldenCase],
    ledger: Ledger,
    *,
    tolerance: float,
    max_abs_diff: float,
    quantization: Quantization | None,
    notes: tuple[str, ...],
) -> Manifest:
    """The manifest, without name, edits and files.

    Args:
        step: the PyTorch model.
        flat: the float32 graph, which MACs are counted on.
        written: what lies in `path`.
        path: the file.
        row: int64 [1, T], the text that MACs are counted for.
        cases: see `golden_cases`.
        ledger: of the file.
        tolerance: for logits, to PyTorch and to this file's own.
        max_abs_diff: the proof's, of the float32 file.
        quantization: what rounded weights changed; then the tolerance to PyTorch is wider.
        notes: decisions worth knowing.
    """
    names = cache_names(len(step.empty_past(1)) // 2)
    empty = {PAST + name: x.numpy() for name, x in zip(names, step.empty_past(1), strict=True)}
    costs = flat_costs(flat, {"input_ids": row.numpy(), "attention_mask": np.ones(row.shape, np.int64), **empty})
    level = {node.name or "": 0 for node in flat.graph}
    nodes = node_table(written, costs, level)
    wide = tolerance if quantization is None else max(tolerance, _MARGIN * _largest(cases))
    session = session_on(path).session
    answer = AnswerSpec(LOGITS, TOKENS)
    tokens = [(case.torch[LOGITS], case.reference[LOGITS]) for case in cases]
    equal = np.concatenate([_following(answer, a) == _following(answer, b) for a, b in tokens])
    outside = [compare(b, a, abs_tol=wide, rel_tol=0.0) for a, b in tokens]
    return Manifest(
        name="generator",
        batch="dynamic",
        inputs=specs_of(session.get_inputs()),
        outputs=specs_of(session.get_outputs()),
        answers=(answer,),
        preprocessing=Preprocessing(),
        # from the costs, not the nodes: a rounded product is another operator
        exits=exit_specs(node_table(flat, costs, level), ["final"]),
        policy=None,
        operating_points=(),
        # a token may flip where the numbers may: rounded weights move them further than any runtime does
        tolerances=Tolerances(tolerance, 0.0, wide, 0.0, flip_margin=wide),
        parity=ParityReport(
            max_abs_diff=max_abs_diff,
            fraction_outside=sum(c.outside for c in outside) / max(1, sum(c.elements for c in outside)),
            rows=len(equal),
            label_agreement=float(equal.mean()),
            exit_agreement=1.0,
            exits_covered=1,
            exits_total=1,
        ),
        ledger=ledger,
        nodes=nodes,
        edits=(),
        opset=int(written.graph.opset_imports[""]),
        ir_version=written.ir_version,
        versions=versions(DISTRIBUTIONS),
        notes=(*notes, *uncounted(flat)),
    )


def _following(answer: AnswerSpec, logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The token after the last position of each row, int64 [N]."""
    return kind_of(answer).decisions(answer, {answer.name: logits[:, -1:]})[LABEL_DIFFERS][:, 0]


def _largest(cases: Sequence[GoldenCase]) -> float:
    """The largest difference of any output of the file to PyTorch's."""

    def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float(np.abs(a - b).max(initial=0.0))

    return max(difference(case.torch[name], case.reference[name]) for case in cases for name in case.torch)
