"""Where the microseconds of an exit go: ONNX Runtime's profile of the deepest path against the network without exits.

Both sessions are profiled in one process, a few runs of each in turn. A node's time is the mean of the faster half of
its runs, less the time of the fastest node of the session, which is what recording a node costs. Parts are sums over
nodes, the network's own ("network": the same arithmetic in colder memory) less those of the network without exits.
The profile sees kernels only. What it does not see, between nodes and at the beginning and the end of every branch, is
the difference to the whole price, which is measured without a profile.

Figures under "planned" are of the same file in a session with ONNX Runtime's memory plan for each graph, which
`edge_runtime` switches off for files with branches. Those under "bare" are of the same branches without heads or
policies, told from outside that no row leaves: no policy can be cheaper.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime
import torch
from numpy.typing import NDArray

from edgewright.edge_runtime.inference.session import session_on
from edgewright.export.exits.control_flow import sink
from edgewright.export.exits.policy_graph import policy_graphs

sys.path.insert(0, str(Path(__file__).parent))
from early_exit import CLASSES, EXITS, MODELS, flat_of, saved, table, timed, with_exits
from figures import Figure, arguments, median_of, report

LAYOUT = ("ReorderInput", "ReorderOutput")
Parts = dict[str, tuple[float, int]]
"""Part -> microseconds of a run, and nodes."""


def opened(path: Path, planned: bool | None, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session as `session_on` makes it, but for the memory plan where `planned` says so; may record a profile."""
    options = session_on(path, threads=1).session.get_session_options()
    if planned is not None:
        options.enable_mem_pattern = planned
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bare(path: Path, to: Path) -> Path:
    """The file at `path` without heads and policies: an input `leave` takes every decision."""
    model = ir.load(path)
    leave = ir.Value(name="leave", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(leave)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "If":
            node.replace_input_with(0, leave)
            then = list(node.attributes["then_branch"].as_graph())
            for reader in then:  # it returns values of the policy, which would then not be removed as unused
                own = [value for value in reader.inputs if value is not None and value.producer() in then]
                for i, value in enumerate(reader.inputs):
                    if value is not None and value.producer() not in then:
                        reader.replace_input_with(i, own[0])
        elif node.name == "exits.final/Add":
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    for _ in range(EXITS + 1):  # what a removed branch read can be removed in the next turn
        ir.passes.common.RemoveUnusedNodesPass()(model)
    if any(part_of(node.op_type, node.name or "") == "head" for node in model.graph.all_nodes()):
        raise SystemExit(
            "heads are left, because something reads the policy still: the names of its nodes have changed"
        )
    return saved(model, to)


def kernel_times(session: onnxruntime.InferenceSession, runs: int) -> Parts:
    """From the profile of `runs` runs; the `If`s, whose time is that of their branches, left out."""
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "If":
            durations[event["args"]["op_name"], event["name"]].append(event["dur"])
    # nodes of several branches may have one name
    nodes = [(key, len(v) // runs, float(np.mean(np.sort(v)[: len(v) // 2]))) for key, v in durations.items()]
    recording = min(time for _, _, time in nodes)
    parts: Parts = {}
    for key, count, time in nodes:
        part = part_of(*key)
        old = parts.get(part, (0.0, 0))
        parts[part] = (old[0] + (time - recording) * count, old[1] + count)
    return parts


def part_of(operator: str, name: str) -> str:
    """What a node belongs to."""
    if operator in LAYOUT or "@" in name:
        return "layout"
    if "heads." in name:
        return "head"
    if name.startswith(("exits.final", "exits/ArgMax")):
        return "end"
    return "policy" if name.startswith("exits") else "network"


def measure(name: str, seconds: float) -> Mapping[str, Figure]:
    """All parts of one network, in microseconds for one exit; the whole price by interleaved blocks."""
    shape: Sequence[int] = MODELS[name][2]
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    model = with_exits(name, EXITS, shape)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flat = flat_of(model, x, False)
        policy = policy_graphs(model.policy.name, CLASSES, flat.graph.opset_imports[""])
        files = {
            "plain": saved(flat_of(model.base, x, False), folder / "plain.onnx"),
            "exits": saved(sink(flat, policy, [model.policy.never] * EXITS)[0], folder / "exits.onnx"),
        }
        files["bare"] = bare(files["exits"], folder / "bare.onnx")
        feeds: dict[str, NDArray[Any]] = {"image": x.numpy()}
        stay = {**feeds, "leave": np.asarray(False)}
        kinds = {"plain": ("plain", None), "exits": ("exits", None), "planned": ("exits", True)}
        quiet = {kind: opened(files[file], planned) for kind, (file, planned) in kinds.items()}
        calls = {kind: lambda s=s: s.run(None, feeds) for kind, s in quiet.items()}
        without = opened(files["bare"], None)
        whole = timed({**calls, "bare": lambda: without.run(None, stay)}, 60, seconds)
        sessions = {kind: opened(files[file], planned, folder / kind) for kind, (file, planned) in kinds.items()}
        # a profile has room for a million events
        runs = 4 * min(250, max(10, int(seconds * 1e6 / 12 / np.median(whole["exits"].blocks))))
        for _ in range(runs // 4):
            for session in sessions.values():
                for _ in range(4):
                    session.run(None, feeds)
        times = {kind: kernel_times(session, runs) for kind, session in sessions.items()}
    figures = {}
    for kind, prefix in (("exits", name), ("planned", f"{name}.planned")):
        for part, (time, count) in sorted(times[kind].items()):
            before, known = times["plain"].get(part, (0.0, 0))
            print(f"{prefix}: {part}, {count - known} more nodes for {EXITS} exits")
            price = (time - before) / EXITS
            figures[f"{prefix}.{part}_us"] = Figure(price, price, price)
        figures[f"{prefix}.whole_us"] = median_of((whole[kind].blocks - whole["plain"].blocks) / EXITS)
    figures[f"{name}.bare.whole_us"] = median_of((whole["bare"].blocks - whole["plain"].blocks) / EXITS)
    table(name, whole, "plain")
    return figures


def main() -> None:
    """Measures the networks that were asked for."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", choices=MODELS, default=["mobilenet_v3_small"])

    options = arguments(__doc__ or "", more)
    figures: dict[str, Figure] = {}
    for name in options.models:
        figures |= measure(name, 10.0 if options.quick else 60.0)
    report("exit_parts", figures, options.json)


if __name__ == "__main__":
    main()
