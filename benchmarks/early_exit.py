"""What exits cost and what they save, on five networks with three exits each.

For every network: the deepest path against the network without exits, the price per exit, the first exit against the
same nodes exported alone, a batch of 32 whose rows leave at different exits against the levels run alone with the same
rows (`compact_vs_ideal`) and against running all rows to the end, also where an eighth of the rows leaves, all at the
first exit (`eighth_leaves_ratio`), and the seconds that exporting six nested exits takes, parity at all four
optimization levels included. In the table only: the deepest path of the same network with nested `torch.cond`
(`cond_export`), of the split layout, and of the file for any batch at one row.

Weights and inputs are random: thresholds are set so that about a quarter of the rows leaves at each exit. All runs of a
comparison are interleaved, in blocks of random order. A figure is the median over the blocks; beside it the table has
the 5 % quantile of single runs and, with one thread, the processor time of the calling thread, which other processes on
the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.inference.session import session_on
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.export import ExportOptions, export_bundle
from edgewright.export.exits.control_flow import sink, take_apart
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.row_compaction import compact
from edgewright.export.exits.split_levels import split_levels
from edgewright.export.graph.capture import capture
from edgewright.export.graph.simplify import simplify
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.stages.early_exit.placement import choose_places
from edgewright.pipeline.tasks.image_classification import ImageClassification

sys.path.insert(0, str(Path(__file__).parent))
from cond_export import export_cond
from figures import Figure, arguments, median_of, report

CLASSES = 10
POLICY = "class_exclusion_softmax"  # the default of the stage
EXITS = 3
NESTED = 6
ROWS = 32
SMALL = (3, 32, 32)
LARGE = (3, 224, 224)
MODELS: dict[str, tuple[str, Mapping[str, Any], tuple[int, ...]]] = {
    "vggsmall": ("zoo:vggsmall", {}, SMALL),
    "resnet50_cifar": ("zoo:resnet50_cifar", {"classes": CLASSES}, SMALL),
    "resnet18": ("torchvision:resnet18", {"num_classes": CLASSES}, LARGE),
    "mobilenet_v3_small": ("torchvision:mobilenet_v3_small", {"num_classes": CLASSES}, LARGE),
    "vit_b_16": ("torchvision:vit_b_16", {"num_classes": CLASSES}, LARGE),
}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Files:
    """Files of one network, and what to feed them."""

    plain: Path
    single: Path
    split: tuple[Path, ...]
    cond: Path | None
    first: Path
    batched: Path
    plain_batched: Path
    levels: tuple[tuple[Path, Arrays], ...]
    thresholds: tuple[float, ...]
    left: tuple[int, ...]
    eighth: tuple[float, ...]


def with_exits(name: str, count: int, shape: Sequence[int]) -> MultiExit:
    """The network with `count` heads, spread evenly over its MACs."""
    torch.manual_seed(0)
    spec, args, _ = MODELS[name]
    model = build(spec, args, Path.cwd()).eval()
    shares = [(i + 1) / (count + 1) for i in range(count)]
    places = choose_places(model, (torch.randn(1, *shape),), (), shares)
    dims = [len(place.shape) for place in places]
    return MultiExit(model, [place.head(1) for place in places], dims, CLASSES, POLICY).eval()


def flat_of(model: torch.nn.Module, x: Tensor, any_rows: bool) -> ir.Model:
    """Captured and simplified, as the export does it."""
    raw = capture(model, (x,), ["image"], [{0: "batch"}] if any_rows else None)
    return simplify(raw, "onnxscript", {"image": x.numpy()})[0]


def saved(model: ir.Model, path: Path) -> Path:
    """Writes the model and gives the path back."""
    ir.save(model, path)
    return path


def first_exit_alone(model: ir.Model) -> onnx.ModelProto:
    """The nodes that a row needs that leaves at the first exit, without the `If`."""
    proto = ir.to_proto(model)
    place, branch = next((i, node) for i, node in enumerate(proto.graph.node) if node.op_type == "If")
    then = next(a.g for a in branch.attribute if a.name == "then_branch")
    nodes = [*proto.graph.node[:place], *then.node]
    for inner, name in zip(then.output, branch.output, strict=True):
        nodes.append(onnx.helper.make_node("Identity", [inner.name], [name]))
    nodes += proto.graph.node[place + 1 :]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(then.initializer)
    return proto


def level_alone(flat: ir.Model, k: int) -> tuple[ir.Model, list[str]]:
    """Level k as a model of its own, and the names of its inputs."""
    apart = take_apart(flat)
    nodes = apart.by_level[k]
    own = {v for node in nodes for v in node.outputs}
    reads = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v not in own)
    weights = [v for v in reads if v.const_value is not None and v.producer() is None]
    inputs = []
    for value in [v for v in reads if v not in weights]:
        fed = ir.Value(name=value.name, type=value.type, shape=value.shape)
        for node, index in [(n, i) for n, i in value.uses() if n in nodes]:
            node.replace_input_with(index, fed)
        inputs.append(fed)
    deeper = {v for later in apart.by_level[k + 1 :] for node in later for v in node.inputs}
    outputs = [apart.logits[k], *(v for v in own if v in deeper)]
    for node in nodes:
        for value in node.outputs:
            value.shape = None
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, name=f"level{k}")
    return apart.model_of(graph), [v.name or "" for v in inputs]


def values_of(flat: ir.Model, names: Sequence[str], x: NDArray[Any], folder: Path) -> Arrays:
    """What the flat graph computes for `x`, by name."""
    proto = ir.to_proto(flat)
    known = {v.name for v in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known and n != "image")
    onnx.save(proto, str(folder / "values.onnx"))
    outputs = session_on(folder / "values.onnx", optimization_level="disabled").run({"image": x})
    return {name: x if name == "image" else outputs[name] for name in names}


def mixing(model: MultiExit, x: Tensor, gone_by: Sequence[float]) -> tuple[float, ...]:
    """Thresholds with which at most these shares of the rows are gone behind each exit, and about as many."""
    with torch.no_grad():
        logits = model.all_logits(x)
    thresholds = torch.full((EXITS,), model.policy.never)
    for k in range(len(gone_by)):
        few, many = model.policy.never, model.policy.always
        for _ in range(20):
            thresholds[k] = (few + many) / 2
            gone = float((model.decide(logits, thresholds).exit_index <= k).float().mean())
            few, many = (few, float(thresholds[k])) if gone > gone_by[k] else (float(thresholds[k]), many)
        thresholds[k] = few
    return tuple(float(t) for t in thresholds)


def export(name: str, shape: Sequence[int], x: Tensor, folder: Path) -> Files:
    """Writes every file of one network."""
    model = with_exits(name, EXITS, shape)
    never = [model.policy.never] * EXITS
    flat, flat_batched = flat_of(model, x[:1], False), flat_of(model, x[:2], True)
    policies = [policy_graphs(model.policy.name, CLASSES, flat.graph.opset_imports[""], rows) for rows in (False, True)]
    single, _ = sink(flat, policies[0], never)
    arrays = x.numpy()
    batched, _ = compact(flat_batched, policies[1], never, [{"image": arrays[:n]} for n in (2, 3)])
    thresholds = mixing(model, x, [(k + 1) / (EXITS + 1) for k in range(EXITS)])
    path = saved(batched, folder / "batched.onnx")
    exits = session_on(path, thresholds=thresholds).run({"image": arrays})["exit_index"]
    left = [int((exits >= k).sum()) for k in range(EXITS + 1)]
    levels = []
    for k, rows in enumerate(left):
        alone, names = level_alone(flat_batched, k)
        levels.append((saved(alone, folder / f"level{k}.onnx"), values_of(flat_batched, names, arrays[:rows], folder)))
    onnx.save(first_exit_alone(single), str(folder / "first.onnx"))
    split = split_levels(flat, policies[0], never, [{"image": arrays[:1]}]).models
    model.thresholds.fill_(model.policy.never)
    failed = export_cond(model, x[:1], folder / "cond.onnx")
    if failed is not None:
        print(f"{name}: torch.cond cannot be exported: {failed}")
    return Files(
        plain=saved(flat_of(model.base, x[:1], False), folder / "plain.onnx"),
        single=saved(single, folder / "single.onnx"),
        split=tuple(saved(level, folder / f"split{k}.onnx") for k, level in enumerate(split)),
        cond=folder / "cond.onnx" if failed is None else None,
        first=folder / "first.onnx",
        batched=path,
        plain_batched=saved(flat_of(model.base, x[:2], True), folder / "plain_batched.onnx"),
        levels=tuple(levels),
        thresholds=thresholds,
        left=tuple(left),
        eighth=(mixing(model, x, [1 / 8])[0], *never[1:]),
    )


@dataclass(frozen=True)
class Times:
    """Microseconds of one contender.

    Attributes:
        blocks: median of every block.
        runs: every run.
        cpu: every run, processor time of the calling thread.
    """

    blocks: NDArray[np.float64]
    runs: NDArray[np.float64]
    cpu: NDArray[np.float64]


def timed(runs: Mapping[str, Callable[[], object]], blocks: int, seconds: float) -> dict[str, Times]:
    """Every contender in every block, in random order; `seconds` for all, but at least five blocks."""
    kept: dict[str, list[tuple[list[int], list[int]]]] = {name: [] for name in runs}
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter_ns()
        run()
        once = max(1, time.perf_counter_ns() - start)
        calls[name] = max(1, min(20, int(seconds * 1e9 / blocks / len(runs) / once)))
    order = np.random.default_rng(0)
    begin = time.perf_counter()
    for block in range(blocks):
        if block >= 5 and time.perf_counter() - begin > seconds:
            break
        for name in order.permutation(list(runs)).tolist():
            wall, cpu = [], []
            if calls[name] > 1:
                runs[name]()  # brings its weights back into the caches
            for _ in range(calls[name]):
                busy, start = time.thread_time_ns(), time.perf_counter_ns()
                runs[name]()
                wall.append(time.perf_counter_ns() - start)
                cpu.append(time.thread_time_ns() - busy)
            kept[name].append((wall, cpu))
    return {
        name: Times(
            np.asarray([np.median(wall) for wall, _ in samples]) / 1e3,
            np.concatenate([wall for wall, _ in samples]) / 1e3,
            np.concatenate([cpu for _, cpu in samples]) / 1e3,
        )
        for name, samples in kept.items()
    }


def table(title: str, times: Mapping[str, Times], baseline: str) -> None:
    """Prints every contender: median and 5 % quantile of the runs, and of their processor time, and the ratios."""
    print(title)
    base = times[baseline]
    for name, own in times.items():
        line = f"  {name:<20}"
        for what, mine, other in (("", own.runs, base.runs), (" cpu", own.cpu, base.cpu)):
            for quantile in (0.5, 0.05):
                value = float(np.quantile(mine, quantile))
                line += f"  p{100 * quantile:g}{what} {value:9.1f} us x{value / np.quantile(other, quantile):.3f}"
        print(line, flush=True)


def call(path: Path, feeds: Arrays, threads: int, thresholds: Sequence[float] | None = None) -> Callable[[], object]:
    """One run of a file on fixed inputs."""
    session = session_on(path, threads=threads, thresholds=thresholds).session
    return lambda: session.run(None, feeds)


def split_call(files: Sequence[Path], feeds: Arrays, threads: int) -> Callable[[], object]:
    """One run of the split layout to its end, with the thresholds that its files store."""
    chain = SplitSession([session_on(path, threads=threads).session for path in files], list(feeds), {})
    return lambda: chain.run(None, feeds)


def measure(name: str, shape: Sequence[int], blocks: int, seconds: float, threads: int) -> dict[str, Figure]:
    """All figures of one network but the export's."""
    x = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        files = export(name, shape, x, Path(folder))
        row, rows = {"image": x[:1].numpy()}, {"image": x.numpy()}
        never, always = [0.0] * EXITS, [1.0] + [0.0] * (EXITS - 1)
        contenders = {
            "plain": call(files.plain, row, threads),
            "deepest": call(files.single, row, threads, never),
            "deepest, split": split_call(files.split, row, threads),
            "deepest, any batch": call(files.batched, row, threads, never),
            "first": call(files.single, row, threads, always),
            "first alone": call(files.first, row, threads, always),
        }
        if files.cond is not None:
            contenders["deepest, torch.cond"] = call(files.cond, row, threads)
        one = timed(contenders, blocks, seconds)
        levels = {
            f"level {k}": call(path, feeds, threads) for k, (path, feeds) in enumerate(files.levels) if files.left[k]
        }
        many = timed(
            {
                "compact": call(files.batched, rows, threads, files.thresholds),
                "compact, an eighth": call(files.batched, rows, threads, files.eighth),
                "plain": call(files.plain_batched, rows, threads),
                **levels,
            },
            blocks,
            seconds,
        )
    table(f"{name}, one row, {threads} threads", one, "plain")
    table(f"{name}, {ROWS} rows of which {list(files.left)} reach the levels", many, "plain")
    ideal = np.sum([many[level].blocks for level in levels], axis=0)
    return {
        f"{name}.deepest_path_ratio": median_of(one["deepest"].blocks / one["plain"].blocks),
        f"{name}.overhead_us_per_exit": median_of((one["deepest"].blocks - one["plain"].blocks) / EXITS),
        f"{name}.first_exit_ratio": median_of(one["first"].blocks / one["first alone"].blocks),
        f"{name}.compact_vs_ideal": median_of(many["compact"].blocks / ideal),
        f"{name}.eighth_leaves_ratio": median_of(many["compact, an eighth"].blocks / many["plain"].blocks),
    }


def export_seconds(name: str, shape: Sequence[int]) -> Figure:
    """Seconds of one whole export with six nested exits, parity on eight rows at all optimization levels included."""
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    task = ImageClassification({"test": (images, torch.arange(8) % CLASSES)}, [str(i) for i in range(CLASSES)])
    model = with_exits(name, NESTED, shape)
    with tempfile.TemporaryDirectory() as folder:
        start, before = time.perf_counter(), os.times()
        manifest = export_bundle(model, task, Path(folder, "bundle"), ExportOptions()).manifest
        seconds, after = time.perf_counter() - start, os.times()
    busy = sum(after[:4]) - sum(before[:4])
    levels = ", ".join(f"{level} {worst:.1e}" for level, worst in manifest.parity.optimization_levels.items())
    print(
        f"{name}: {len(model.specs)} nested exits exported in {seconds:.1f} s ({busy:.1f} s of processor time); "
        f"{manifest.parity.exits_covered} of {manifest.parity.exits_total} ways out proven, max |diff| at {levels}",
        flush=True,
    )
    return Figure(seconds, seconds, seconds)


def main() -> None:
    """Measures every network; with --quick the first one only, briefly."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", choices=MODELS, help="which networks; default all")

    options = arguments(__doc__ or "", more)
    figures: dict[str, Figure] = {}
    for name in options.models or (list(MODELS)[:1] if options.quick else MODELS):
        shape = MODELS[name][2]
        blocks, seconds = (8, 10.0) if options.quick else (60, 60.0)
        figures |= measure(name, shape, blocks, seconds, options.threads)
        if not options.quick:
            figures[f"{name}.export_seconds"] = export_seconds(name, shape)
    report("early_exit", figures, options.json)


if __name__ == "__main__":
    main()
