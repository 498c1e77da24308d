"""Exit policies against each other: the same trained network, the same heads, four budgets of mean MACs, several seeds.

Per setting (`exit_settings.py`: task, network, training of the heads) and seed heads are trained once per loss: binary
cross entropy of each class (both modes) and cross entropy. Every policy's thresholds are then set on the validation
split so that accuracy is best within the budget (a share of the deepest path's MACs), by the coordinate search, by the
published greedy search, or by MSDNet's geometric schedule; `tolerance` is the cheapest setting within half a point of
the network's own end, what the stage calls `balanced`, `confident` the same with `confidence: 0.95`. The test split is
read once, at the end.

`SETTING.POLICY.BUDGET.accuracy` and `.worst_class` are means over the seeds with their 95 % interval;
`.macs` is the mean cost on test, `.lost` what the network's own end has more there, `.gain` the paired difference in
accuracy to `max_probability`, `.over_frozen` the one to the same policy, network and seed with the heads alone trained.
The setting leads the name, because two tasks cannot share one. `SETTING.end_LOSS.accuracy` is the network's own end,
`SETTING.head_LOSS.EXIT.accuracy` a head alone.

    python benchmarks/exit_policies.py   digits and glyphs, seeds 0, 1 and 2
    python benchmarks/exit_policies.py --settings glyphs_joint --seeds 3 4 --keep FOLDER   what is done is kept
    python benchmarks/exit_policies.py --settings glyphs --speed   only how fast thresholds are searched, also with
                                                                   1000 classes, 5000 rows and six exits (`wide`)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgewright.edge_runtime.measure.paired import standard_errors
from edgewright.models.layers.exit_policies import policy_named
from edgewright.pipeline.stages.early_exit.thresholds.limits import Limits
from edgewright.pipeline.stages.early_exit.thresholds.search import ThresholdSearch
from edgewright.pipeline.stages.early_exit.thresholds.trials import ExitEvaluator

sys.path.insert(0, str(Path(__file__).parent))
from exit_settings import SETTINGS, heads_of
from figures import Figure, arguments, mean_of, report

BUDGETS = (0.25, 0.4, 0.55, 0.7)
TOLERANCE = 0.005
CONFIDENCE = 0.95
POINTS: Mapping[str, Limits] = {
    **{str(budget): Limits(budget=budget) for budget in BUDGETS},
    "confident": Limits(errors=standard_errors(CONFIDENCE)),
    "tolerance": Limits(),
}
"""What is searched for; the accuracy of the last two is that of the network's own end less `TOLERANCE`."""
MAIN = ("digits", "glyphs")
ROWS: Mapping[str, tuple[str, str, str]] = {
    "class_exclusion_softmax": ("class_exclusion_softmax", "cross_entropy", "coordinate"),
    "class_exclusion_softmax_greedy": ("class_exclusion_softmax", "cross_entropy", "greedy"),
    "class_exclusion_softmax_geometric": ("class_exclusion_softmax", "cross_entropy", "geometric"),
    "max_probability": ("max_probability", "cross_entropy", "coordinate"),
    "max_probability_greedy": ("max_probability", "cross_entropy", "greedy"),
    "msdnet": ("max_probability", "cross_entropy", "geometric"),
    "entropy": ("entropy", "cross_entropy", "coordinate"),
    "entropy_greedy": ("entropy", "cross_entropy", "greedy"),
    "class_exclusion_uniform": ("class_exclusion", "uniform_scale", "coordinate"),
    "published": ("class_exclusion", "uniform_scale", "greedy"),
    "class_exclusion": ("class_exclusion", "pos_weight", "coordinate"),
    "published_pos_weight": ("class_exclusion", "pos_weight", "greedy"),
    "class_exclusion_permanent": ("class_exclusion_permanent", "uniform_scale", "coordinate"),
    "max_probability_uniform": ("max_probability", "uniform_scale", "coordinate"),
}
"""Per row of the table: policy, loss of the heads, search. `published` is what the release does, `published_pos_weight`
what its loss seems to mean."""


def evaluator(found: Mapping[str, Tensor], split: str, policy: str, loss: str) -> ExitEvaluator:
    """Of one split's cached logits."""
    logits = [found[f"{loss}.{split}.{k}"] for k in range(len(found["macs"]))]
    return ExitEvaluator(policy_named(policy), logits, found[split], found["macs"].tolist())


def right(found: Mapping[str, Tensor], split: str, loss: str, head: int) -> float:
    """Accuracy of one head on all rows, the network's own end being the last."""
    answers = found[f"{loss}.{split}.{head}"].argmax(dim=1)
    return float((answers == found[split]).double().mean())


def rows_of(setting: str, wanted: Sequence[str]) -> list[str]:
    """What of the wanted rows has heads that were trained for it."""
    return [row for row in ROWS if row in wanted and ROWS[row][1] in SETTINGS[setting].losses]


def choose(found: Mapping[str, Tensor], rows: Sequence[str], seed: int) -> dict[tuple[str, str], list[float]]:
    """The thresholds of `rows` at every one of `POINTS`, on the validation split."""
    chosen: dict[tuple[str, str], list[float]] = {}
    searches: dict[tuple[str, str], ThresholdSearch] = {}
    for row in rows:
        policy, loss, method = ROWS[row]
        start = time.process_time()
        if (policy, loss) not in searches:
            generator = torch.Generator().manual_seed(seed)
            searches[policy, loss] = ThresholdSearch(evaluator(found, "validation", policy, loss), 1, generator)
        search = searches[policy, loss]
        before = sum(map(len, search.everything.log))
        for point, limits in POINTS.items():
            if limits.budget is None:
                end = right(found, "validation", loss, len(found["macs"]) - 1)
                limits = replace(limits, accuracy=end - TOLERANCE)
            published = search.published(limits)
            best = search.run(limits, published.values()) if method == "coordinate" else published[method]
            chosen[row, point] = best.thresholds[0].tolist()
        tried, seconds = sum(map(len, search.everything.log)) - before, time.process_time() - start
        print(f"  {row}: {tried} settings in {seconds:.1f} s of processor time", flush=True)
    return chosen


def one_seed(found: Mapping[str, Tensor], rows: Sequence[str], seed: int) -> dict[str, float]:
    """Figures of `rows` for one setting and seed: thresholds on validation first, all of them, then the test split."""
    figures: dict[str, float] = {}
    last = len(found["macs"]) - 1
    for (row, point), thresholds in choose(found, rows, seed).items():
        policy, loss, _ = ROWS[row]
        result = evaluator(found, "test", policy, loss).evaluate(thresholds)
        name = f"{row}.{point}"
        figures[f"{name}.accuracy"] = float(result.accuracy[0])
        figures[f"{name}.worst_class"] = float(result.worst_class_accuracy[0])
        figures[f"{name}.macs"] = float(result.mean_macs[0] / found["macs"][-1])
        if POINTS[point].budget is None:
            figures[f"{name}.lost"] = right(found, "test", loss, last) - figures[f"{name}.accuracy"]
    for loss in {ROWS[row][1]: None for row in rows}:
        figures |= {f"head_{loss}.{k}.accuracy": right(found, "test", loss, k) for k in range(last)}
        figures[f"end_{loss}.accuracy"] = right(found, "test", loss, last)
    return figures


def search_speed(found: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Settings tried in a second of processor time by the coordinate search, preparation included.

    `.fast` and `.general` are the same search on sets of classes or rows that were worked out before, and on the path
    of any policy; they must try and find the same.
    """
    speed: dict[str, float] = {}
    compared = {"class_exclusion_softmax": "cross_entropy", "max_probability": "cross_entropy"}
    for policy, loss in {**compared, "class_exclusion": "uniform_scale"}.items():
        logs = []
        for name in ("fast", "general"):
            start = time.process_time()
            everything = evaluator(found, "validation", policy, loss)
            if name == "general":
                everything.fast = None
            search = ThresholdSearch(everything, 1, torch.Generator().manual_seed(seed))
            for budget in BUDGETS:
                limits = Limits(budget=budget)
                search.run(limits, search.published(limits).values())
            seconds = time.process_time() - start
            logs.append(torch.cat([trials.table() for trials in everything.log]))
            speed[f"{policy}.{name}.settings_per_s"] = len(logs[-1]) / seconds
            print(f"  {policy}, {name}: {len(logs[-1])} settings in {seconds:.2f} s (cpu)", flush=True)
        if not all(torch.equal(log, logs[0]) for log in logs):
            raise RuntimeError(f"{policy}: the fast search and the general one tried or found different settings")
    return speed


def wide_speed(seed: int, rows: int = 5000, classes: int = 1000, exits: int = 6) -> dict[str, float]:
    """The search of one operating point with many classes, on logits made up: later heads know more.

    MSDNet's schedules, from which the search starts and which every further point shares, are timed by themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=generator)
    ease = 3.0 * torch.rand(rows, generator=generator)
    logits = []
    for k in range(exits + 1):
        z = torch.randn(rows, classes, generator=generator)
        z[torch.arange(rows), targets] += 1.0 + (1.0 + 1.2 * k) * ease
        logits.append(1.5 * z)
    policy = policy_named("class_exclusion_softmax")
    start = time.process_time()
    everything = ExitEvaluator(policy, logits, targets, [100 * (k + 1) for k in range(exits + 1)])
    search = ThresholdSearch(everything, 3, torch.Generator().manual_seed(seed))
    ready = time.process_time()
    limits = Limits(accuracy=float(everything.at_the_end.double().mean()) - TOLERANCE)
    before = len(torch.cat([t.accuracy for t in (*everything.log, *search.sample.log)]))
    search.run(limits, search.published(limits).values())
    tried = len(torch.cat([t.accuracy for t in (*everything.log, *search.sample.log)])) - before
    done = time.process_time()
    return {"schedules_seconds": ready - start, "settings": tried, "settings_per_s": tried / (done - ready)}


def kept(folder: Path, setting: str, rows: Sequence[str], seed: int, quick: bool) -> dict[str, float]:
    """The figures of one setting and seed, as far as they are in `folder` from there."""
    results = folder / f"{setting}.{seed}.json"
    figures: dict[str, float] = json.loads(results.read_text()) if results.exists() else {}
    missing = [row for row in rows if f"{row}.confident.macs" not in figures]
    if missing:
        figures |= one_seed(heads_of(setting, seed, folder, quick), missing, seed)
        results.write_text(json.dumps(figures, indent=1))
    return figures


def gains(figures: Mapping[str, float], rows: Sequence[str]) -> dict[str, float]:
    """Differences in accuracy to `max_probability`, where it is among the figures."""
    if f"max_probability.{BUDGETS[0]}.accuracy" not in figures:
        return {}
    return {
        f"{row}.{point}.gain": figures[f"{row}.{point}.accuracy"] - figures[f"max_probability.{point}.accuracy"]
        for row in rows
        for point in POINTS
    }


def over_frozen(setting: str, runs: Mapping[str, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Per seed the difference to the setting in which the heads of the same network alone are trained, if measured."""
    frozen = SETTINGS[setting].network
    if setting == frozen or frozen not in runs:
        return [{} for _ in runs[setting]]
    return [
        {
            f"{name.removesuffix('.accuracy')}.over_frozen": value - before[name]
            for name, value in after.items()
            if name.endswith(".accuracy") and name in before
        }
        for before, after in zip(runs[frozen], runs[setting], strict=True)
    ]


def table(setting: str, rows: Sequence[str], figures: Mapping[str, Figure]) -> None:
    """Accuracy, worst class and gain over `max_probability`, in per cent, one line per row."""
    print(f"\n{setting}: test accuracy / worst class (difference to max_probability) at {BUDGETS} of the MACs, and")
    print(
        f"accuracy (difference to the network's own end) @ share of the MACs where validation may lose {TOLERANCE:.1%}"
    )
    print(f"with {CONFIDENCE:.0%} confidence, and on its own rows")
    for row in rows:
        cells = []
        for point in POINTS:
            accuracy, worst, macs = (
                figures[f"{setting}.{row}.{point}.{x}"] for x in ("accuracy", "worst_class", "macs")
            )
            if POINTS[point].budget is None:
                lost = figures[f"{setting}.{row}.{point}.lost"]
                cells.append(f"{accuracy.value:6.2%} ({-lost.value:+.2%}) @{macs.value:6.1%}")
                continue
            gain = figures.get(f"{setting}.{row}.{point}.gain", Figure(np.nan, np.nan, np.nan))
            half = gain.high - gain.value
            cells.append(f"{accuracy.value:6.2%} /{worst.value:4.0%} ({100 * gain.value:+.2f}±{100 * half:.2f})")
        print(f"{row:34}" + "  ".join(cells))
    for loss in {ROWS[row][1]: None for row in rows}:
        print(f"own end, heads trained by {loss}: {figures[f'{setting}.end_{loss}.accuracy'].value:.2%}")


def main() -> None:
    """Measures the settings; with --quick one seed of digits, trained briefly."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(MAIN))
        parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="of the table")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for networks, logits and interim results")
        parser.add_argument("--speed", action="store_true", help="measure the search alone")

    options = arguments(__doc__ or "", more)
    torch.set_num_threads(options.threads)
    seeds, settings = ([0], ["digits"]) if options.quick else (options.seeds, options.settings)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for setting in settings:
            if options.speed:
                runs[setting] = [search_speed(heads_of(setting, s, folder, options.quick), s) for s in seeds]
            else:
                rows = rows_of(setting, options.rows)
                runs[setting] = [kept(folder, setting, rows, s, options.quick) for s in seeds]
    figures: dict[str, Figure] = {}
    for setting in settings:
        found = runs[setting]
        if not options.speed:
            rows = rows_of(setting, options.rows)
            found = [a | gains(a, rows) | b for a, b in zip(found, over_frozen(setting, runs), strict=True)]
        names = [name for name in found[0] if all(name in run for run in found)]
        figures |= {f"{setting}.{name}": mean_of([run[name] for run in found]) for name in names}
        if not options.speed:
            table(setting, rows, figures)
    if options.speed:
        wide = [wide_speed(seed) for seed in seeds]
        figures |= {f"wide.{name}": mean_of([run[name] for run in wide]) for name in wide[0]}
    report("exit_policies", figures, options.json)


if __name__ == "__main__":
    main()
