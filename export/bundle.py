"""From a PyTorch model to a proven bundle: capture, simplify, sink, prove, write (DESIGN §4)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.bundle.archive import write_runtime_archive
from edgewright.edge_runtime.bundle.bundle import pack_zip, write_manifest
from edgewright.edge_runtime.bundle.golden import write_golden
from edgewright.edge_runtime.bundle.manifest import (
    ANSWERS,
    GOLDEN_FILE,
    LABELS,
    MODEL_FILE,
    RUNTIME_FILE,
    TOKENIZER_FILE,
    Ledger,
    Manifest,
    OperatingPoint,
    PolicySpec,
    SplitSpec,
    Tolerances,
)
from edgewright.edge_runtime.errors import ExportError
from edgewright.edge_runtime.versions import versions
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.sources.module_state import untouched

from .accounts.duplication import check_duplication
from .accounts.ledger import build_ledger, optimized
from .accounts.node_table import exit_specs, flat_costs, node_table, on_the_graph, uncounted
from .bundle_folder import DISTRIBUTIONS, check_target, put_in_place, scratch, writing
from .exits.control_flow import levels, sink
from .exits.policy_graph import PolicyGraphs, policy_graphs
from .exits.row_compaction import compact
from .exits.split_files import prove_split, write_split
from .exits.split_levels import split_levels
from .graph.capture import capture, flat_name
from .graph.model_file import check_file, save_external, save_model
from .graph.simplify import Feeds, simplify
from .options import Batch, ExportOptions
from .proof.empty_batch import takes_no_rows
from .proof.parity import ParityResult, check_parity
from .proof.subject import answers_in
from .source import Source, Tokenizing, answers_of
from .target import held_to


@dataclass(frozen=True)
class ExportResult:
    """A written bundle and what it answered on the split that parity was checked on.

    Attributes:
        path: the bundle's folder.
        manifest: as written.
        split: the split.
        rows: its number of rows that were run.
        label: int64 [rows], from the exported file, of the first answer that gives each row a class; empty without one.
        exit_index: int64 [rows], from the exported file.
    """

    path: Path
    manifest: Manifest
    split: str
    label: NDArray[np.int64]
    exit_index: NDArray[np.int64]

    @property
    def mean_macs(self) -> float:
        """MACs a row took on average, the exits counted."""
        macs = np.asarray([e.macs for e in self.manifest.exits], dtype=np.float64)
        return float(macs[self.exit_index].mean())


def export_bundle(
    model: nn.Module,
    source: Source,
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    operating_points: Sequence[OperatingPoint] = (),
    edits: Sequence[Mapping[str, Any]] = (),
    name: str | None = None,
    split: str | None = None,
    parity_rows: int | None = None,
    external_above: int | None = None,
) -> ExportResult:
    """Exports `model`, proves that the file computes the same, and writes a bundle.

    A failed proof writes nothing, and leaves what was at `out` as it was.

    Args:
        model: called positionally; returns what `answers_of` the source says, logits [N, C] of a classifier or any
            other answer, or is a `MultiExit`; not changed.
        source: names, labels and real inputs; a `pipeline.Task` is one.
        out: folder of the bundle; replaced if it is a bundle already.
        options: see `ExportOptions`.
        operating_points: validated settings of the thresholds, the first equal to the model's own.
        edits: what the stages did, for the manifest.
        name: of the bundle, default the task's.
        split: rows for the parity check, default ``test``, else the last split that exists.
        parity_rows: check at most so many rows; None: all.
        external_above: bytes of weights above which they go to ``model.onnx.data``; None: see `save_model`.

    Raises:
        ExportError: the model cannot become ONNX, or options that do not fit it.
        ParityError: the file answers differently, or an exit cannot be reached.
        InputError: `out` is something else than a bundle, or cannot be written.
    """
    options = options or ExportOptions()
    target = Path(out)
    check_target(target)
    chosen = split or ("test" if "test" in source.splits else list(source.splits)[-1])
    with untouched(model), scratch(target) as folder:
        work = Path(folder, "bundle")
        work.mkdir()
        batch = batch_of(model, options)
        raw, flat, note = _flat_graph(model, source, chosen, options, batch)
        flat_path = Path(folder, "flat.onnx")
        final, more = _final_graph(model, flat, options, batch, source, chosen)
        _write_metadata(final, source, model)
        with writing(target):
            save_external(flat, flat_path)
            save_model(final, work / MODEL_FILE, external_above)
        check_file(work / MODEL_FILE)
        runtime = optimized(work / MODEL_FILE)
        ledger = build_ledger(model, raw, final, runtime, options.shared_across_exits == "latency")
        notes = (note, *more, *check_duplication(model, raw, final, runtime, ledger))
        del raw, runtime  # each holds all weights
        parity = check_parity(
            model,
            flat_path,
            work / MODEL_FILE,
            source,
            chosen,
            abs_tol=options.tolerance.abs,
            rel_tol=options.tolerance.rel,
            rows=parity_rows,
            points={point.name: point.thresholds for point in operating_points[1:]},
        )
        parity.require()
        split_spec: SplitSpec | None = None
        if options.split and isinstance(model, MultiExit):
            split_graphs = split_levels(flat, *_exits_of(model, flat, batch), _row_feeds(batch, source, chosen))
            with writing(target):
                split_spec, note = write_split(split_graphs, work, external_above)
            notes = (*notes, note)
        manifest = _manifest(
            model, source, options, flat, final, ledger, parity, _example(source, chosen, 1),
            operating_points=operating_points, edits=edits, name=name or source.name, notes=notes, batch=batch,
            split=split_spec,
        )  # fmt: skip
        manifest = held_to(options.target, manifest)
        with writing(target):
            write_golden(work / GOLDEN_FILE, parity.golden)
            write_runtime_archive(work / RUNTIME_FILE)
            if source.preprocessing.kind == "text" and isinstance(source, Tokenizing):
                (work / TOKENIZER_FILE).write_text(source.tokenizer, encoding="utf-8")
            manifest = write_manifest(work, manifest)
        if split_spec is not None:
            prove_split(work)
        with writing(target):
            put_in_place(work, target)
    if options.zip:
        with writing(target):
            # not with_suffix: a bundle may be called net.v2
            pack_zip(target, target.with_name(f"{target.name}.zip"))
    return ExportResult(target, manifest, chosen, parity.label, parity.exit_index)


def _example(source: Source, split: str, rows: int) -> tuple[Tensor, ...]:
    data = source.splits[split]
    return data.batch([i % len(data) for i in range(rows)]).inputs


def batch_of(model: nn.Module, options: ExportOptions) -> Batch:
    """What the options mean for this model; without exits nothing is to be compacted."""
    if isinstance(model, MultiExit):
        if options.batch == "dynamic":
            raise ExportError(
                "export.batch `dynamic` runs every row to the end, and a model with exits is to save that: set it to "
                "`single` (or `auto`) for one row a run, to `compact` for any number, or leave the exits out"
            )
        return "single" if options.batch == "auto" else options.batch
    return "single" if options.batch == "single" else "dynamic"


def _flat_graph(
    model: nn.Module, source: Source, split: str, options: ExportOptions, batch: Batch
) -> tuple[ir.Model, ir.Model, str]:
    """The fresh capture, and the simplified graph with a note on how it went."""
    single = batch == "single"
    inputs = _example(source, split, 1 if single else 2)
    axes: list[Mapping[int, str]] | None = None if single else list(source.dynamic_axes)
    if single and any(set(a) - {0} for a in source.dynamic_axes):
        axes = [{axis: name for axis, name in a.items() if axis != 0} for a in source.dynamic_axes]
    raw = capture(model, inputs, source.input_names, axes, options.opset, answers_of(source))
    feeds = {name: x.numpy() for name, x in zip(source.input_names, inputs, strict=True)}
    flat, note = simplify(
        raw, options.simplify, feeds, abs_tolerance=options.tolerance.abs, rel_tolerance=options.tolerance.rel
    )
    if flat is raw and options.simplify != "none":
        # what the simplifier would have merged: readers of one basis multiply it once. An embedding that is the head
        # too is a reason not to keep its result, because it folds the transposition, which would store it twice
        flat = raw.clone()
        ir.passes.common.CommonSubexpressionEliminationPass()(flat)
    return raw, flat, note


def _final_graph(
    model: nn.Module, flat: ir.Model, options: ExportOptions, batch: Batch, source: Source, split: str
) -> tuple[ir.Model, tuple[str, ...]]:
    if not isinstance(model, MultiExit):
        final = flat.clone()
        named = {flat_name(index): spec.name for index, spec in enumerate(answers_of(source))}
        for value in final.graph.outputs:
            name = named[value.name or ""]
            if name in final.graph.initializers:
                raise ExportError(f"the answer {name!r} has the name of a parameter of the model: give it another")
            value.name = name
        return final, ()
    policy, thresholds = _exits_of(model, flat, batch)
    feeds = _row_feeds(batch, source, split)
    if batch == "single":
        return sink(flat, policy, thresholds, options.shared_across_exits)
    final, notes = compact(flat, policy, thresholds, feeds, options.shared_across_exits)
    if takes_no_rows(final, feeds[0]):
        return final, notes
    return compact(flat, policy, thresholds, feeds, options.shared_across_exits, skip_empty=True)


def _exits_of(model: MultiExit, flat: ir.Model, batch: Batch) -> tuple[PolicyGraphs, list[float]]:
    opset = flat.graph.opset_imports[""]
    policy = policy_graphs(model.policy.name, model.classes, opset, any_rows=batch == "compact")
    return policy, [float(t) for t in model.thresholds]


def _row_feeds(batch: Batch, source: Source, split: str) -> list[Feeds]:
    """The same rows, two and three of them, so that only the row axes differ; one for a file that takes one."""
    arrays = {n: x.numpy() for n, x in zip(source.input_names, _example(source, split, 3), strict=True)}
    return [{name: array[:rows] for name, array in arrays.items()} for rows in ((1,) if batch == "single" else (2, 3))]


def _write_metadata(final: ir.Model, source: Source, model: nn.Module) -> None:
    exits = [spec.at for spec in model.specs] if isinstance(model, MultiExit) else []
    final.metadata_props.update(
        {
            LABELS: json.dumps(list(source.labels)),
            ANSWERS: json.dumps([asdict(spec) for spec in answers_in(model, source)], sort_keys=True),
            "edgewright.preprocessing": json.dumps(asdict(source.preprocessing), sort_keys=True),
            "edgewright.exits": json.dumps(exits),
        }
    )


def _manifest(
    model: nn.Module,
    source: Source,
    options: ExportOptions,
    flat: ir.Model,
    final: ir.Model,
    ledger: Ledger,
    parity: ParityResult,
    example: tuple[Tensor, ...],
    *,
    operating_points: Sequence[OperatingPoint],
    edits: Sequence[Mapping[str, Any]],
    name: str,
    notes: tuple[str, ...],
    batch: Batch,
    split: SplitSpec | None,
) -> Manifest:
    policy: PolicySpec | None = None
    points: tuple[OperatingPoint, ...] = ()
    exit_names = ["final"]
    if isinstance(model, MultiExit):
        exit_names = [*(spec.at for spec in model.specs), "final"]
        policy = PolicySpec(model.policy.name, model.policy.never, model.policy.always, excludes=model.policy.excludes)
        stored = tuple(float(t) for t in model.thresholds)
        points = tuple(operating_points) or (OperatingPoint("stored", stored),)
        if not np.allclose(points[0].thresholds, stored, atol=1e-6):
            raise ExportError(f"the first operating point {points[0].name!r} is not what the model holds: {stored}")
    level = {node.name or "": k for node, k in levels(flat.graph, len(exit_names)).items()}
    row = {name: x.numpy() for name, x in zip(source.input_names, example, strict=True)}
    nodes = node_table(final, flat_costs(flat, row), level)
    exits = exit_specs(nodes, exit_names)
    points, costed = on_the_graph(points, exits)
    return Manifest(
        name=name,
        batch=batch,
        inputs=parity.inputs,
        outputs=parity.outputs,
        answers=answers_in(model, source),
        preprocessing=source.preprocessing,
        exits=exits,
        policy=policy,
        operating_points=points,
        tolerances=Tolerances(
            reference_abs=options.tolerance.abs,
            reference_rel=options.tolerance.rel,
            torch_abs=options.tolerance.abs,
            torch_rel=options.tolerance.rel,
            flip_margin=parity.flip_margin,
        ),
        parity=parity.report,
        ledger=ledger,
        nodes=nodes,
        edits=tuple(edits),
        opset=int(final.graph.opset_imports[""]),
        ir_version=final.ir_version,
        versions=versions(DISTRIBUTIONS),
        notes=(*notes, *uncounted(flat), *costed),
        split=split,
    )
