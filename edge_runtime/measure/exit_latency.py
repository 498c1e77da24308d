"""What a row costs that leaves at each exit, measured on this machine; input of the threshold search on the host.

Every exit is forced in turn by its thresholds, on the same inputs, in one process and in blocks of random order; both
layouts of a bundle that has them. A number is the median of runs that did leave there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import MODEL_FILE, PolicySpec
from ..device import collect_facts, fingerprint
from ..errors import EdgewrightError, InputError
from ..inference.options import LAYOUTS, SessionKeywords, SessionOptions
from ..inference.providers import warn_of_fallback
from ..process.plain_text import printable
from . import statistics
from .bench_inputs import Feed, golden_feeds, read_inputs, user_feeds
from .child import Artefact, block_settings, run_child
from .paired import paired_ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCHEMA_VERSION = 1


def latency_table(
    bundle: str | os.PathLike[str] | Bundle,
    options: SessionOptions | None = None,
    *,
    inputs: str | os.PathLike[str] | None = None,
    blocks: int = 40,
    block_runs: int = 5,
    timeout_s: float = 900.0,
    seed: int = 0,
    **given: Unpack[SessionKeywords],
) -> dict[str, Any]:
    """Measures the latency of a row by the exit at which it leaves.

    Args:
        bundle: folder, zip or open `Bundle`, with exits.
        options: as in `session.load`, without thresholds and operating point. The numbers of its layout stand under
            ``exits``; both are measured if the bundle has both.
        inputs: .npy or .npz; None: the bundle's own natural golden inputs.
        blocks: every block runs every exit and layout.
        block_runs: runs of each in a block.
        timeout_s: the measuring process is stopped after this.
        seed: of the order.
        given: as in `session.load`.

    Returns:
        ``exits``: microseconds of a row that leaves at the first exit, the second, ..., at the network's end;
        ``device``: where; ``layouts``: the same for each layout, with its 95 % intervals; ``split_over_file``: ratio,
        interval and verdict for each exit, None without a split layout.

    Raises:
        BundleError: the bundle is not intact.
        InputError: no exits, an option that does not fit, or an exit that none of the inputs takes although forced.
        ProviderError: the provider is not there, or does not take every node.
    """
    options = SessionOptions.of(options, given).without(
        "thresholds",
        "operating_point",
        because="the exits are forced by thresholds of the measurement's own: leave thresholds and operating point out",
    )
    settings = block_settings("exits", options, blocks=blocks, block_runs=block_runs, warmup_seconds=2.0, seed=seed)
    with ExitStack() as stack:
        opened = bundle if isinstance(bundle, Bundle) else stack.enter_context(open_bundle(bundle))
        manifest = opened.manifest
        if manifest.policy is None:
            raise InputError(f"{manifest.name} has no early exits: `bench` measures its latency")
        layout = options.on(manifest).layout
        feeds = _feeds(opened, inputs)
        settings["exit_thresholds"] = forced_thresholds(manifest.policy, len(manifest.exits))
        layouts = [name for name in LAYOUTS if name == "file" or manifest.split is not None]
        artefacts = [
            Artefact(name, opened.path(MODEL_FILE), feeds, opened, options.replaced(layout=name)) for name in layouts
        ]
        result = run_child(artefacts, settings, timeout_s)
        source, sha256 = str(opened.source), opened.sha256
    if result.status != "ok":
        raise EdgewrightError(f"measuring the exits of {source} {result.status}: {result.reason}")
    placements = result.answer["placement"]
    for placement in placements:
        warn_of_fallback(placement)  # the warning of the measuring process was not seen
    names = [exit_.name for exit_ in manifest.exits]
    per_block = {
        name: [_block_medians(result.samples[i, k], result.exits[i, k], k, names[k]) for k in range(len(names))]
        for i, name in enumerate(layouts)
    }
    figures = {name: _figures(blocks_of, seed) for name, blocks_of in per_block.items()}
    facts = {name: value for name, (value, _) in collect_facts().items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": manifest.name,
        "bundle_sha256": sha256,
        "device": _device(facts, settings, placements[layouts.index(layout)]),
        "fingerprint": fingerprint(facts),
        "load_average": facts.get("load_average_1min"),
        "settings": {**settings, "layout": layout, "inputs": len(feeds)},
        "unit": "us",
        "exit_names": names,
        "exits": figures[layout]["exits"],
        "layouts": figures,
        "split_over_file": _compared(per_block, seed) if len(layouts) > 1 else None,
    }


def forced_thresholds(policy: PolicySpec, exits: int) -> list[list[float]]:
    """Thresholds that send every row to exit 0, 1, ..., to the network's end.

    Args:
        policy: of the manifest.
        exits: their number, the network's end included.
    """
    early = exits - 1
    return [[policy.always if i == k else policy.never for i in range(early)] for k in range(exits)]


def latency_table_text(table: Mapping[str, Any]) -> str:
    """The table on one screen."""
    head = printable(f"{table['name']}: {table['device']}, microseconds of a row by the exit where it leaves")
    lines, names = [head], [printable(name) for name in table["exit_names"]]
    width = max(map(len, names))
    for k, name in enumerate(names):
        line = f"  exit {k}  {name:<{width}}"
        for layout, figures in table["layouts"].items():
            low, high = figures["ci95"][k]
            line += f"   {layout} {figures['exits'][k]:.1f} [{low:.1f}, {high:.1f}]"
        if table["split_over_file"] is not None:
            ratio = table["split_over_file"][k]
            line += f"   split is {ratio['verdict']} (x{ratio['value']:.3f})"
        lines.append(line)
    return "\n".join(lines)


def _feeds(bundle: Bundle, inputs: str | os.PathLike[str] | None) -> list[Feed]:
    if inputs is None:
        return golden_feeds(bundle, 1)
    return user_feeds(read_inputs(inputs), bundle.manifest.inputs, bundle.manifest.preprocessing, 1)


def _block_medians(
    samples: NDArray[np.int64], exits: NDArray[np.int64], exit_index: int, name: str
) -> NDArray[np.float64]:
    """Median microseconds of every block [blocks]; NaN for a block in which no row left where it was to."""
    there = exits == exit_index
    if not there.any():
        raise InputError(
            f"none of the inputs leaves at exit {exit_index} ({name}) although it was forced: the scores of its head "
            "tie; give other --inputs"
        )
    values = [np.median(row[mask]) / 1e3 if mask.any() else np.nan for row, mask in zip(samples, there, strict=True)]
    return np.asarray(values, np.float64)


def _figures(blocks: Sequence[NDArray[np.float64]], seed: int) -> dict[str, Any]:
    known = [values[np.isfinite(values)] for values in blocks]
    return {
        "exits": [float(np.median(values)) for values in known],
        "ci95": [list(statistics.median_interval(values, seed)) for values in known],
        "p5": [float(np.quantile(values, 0.05)) for values in known],
    }


def _compared(per_block: Mapping[str, Sequence[NDArray[np.float64]]], seed: int) -> list[dict[str, Any]]:
    compared = []
    for one, split in zip(per_block["file"], per_block["split"], strict=True):
        both = np.isfinite(one) & np.isfinite(split)
        compared.append(paired_ratio(one[both], split[both], seed=seed).to_dict())
    return compared


def _device(facts: Mapping[str, Any], settings: Mapping[str, Any], placement: Mapping[str, Any]) -> str:
    """A line that names the machine and the providers that took nodes."""
    what = facts.get("board") or facts.get("cpu_model") or facts.get("machine") or "unknown machine"
    took = placement["nodes_per_provider"]
    ran = [name for name in placement["session"] if took is None or took.get(name)]
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in ran)
    threads = settings["threads"] or "default"
    return f"{what}, onnxruntime {facts.get('onnxruntime')}, {providers}, threads {threads}"
