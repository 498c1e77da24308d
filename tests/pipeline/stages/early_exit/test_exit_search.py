"""The threshold search against brute force, against the published loop written out, and against MultiExit itself."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.errors import RecipeError, StageError
from edgewright.pipeline.recipe.recipe import parse_recipe
from edgewright.pipeline.stages.early_exit.thresholds import (
    confidence as exit_confidence,
)
from edgewright.pipeline.stages.early_exit.thresholds import (
    exclusion as exit_masks,
)
from edgewright.pipeline.stages.early_exit.thresholds import (
    search as exit_search,
)
from edgewright.pipeline.stages.early_exit.thresholds import (
    trials as exit_trials,
)
from edgewright.pipeline.stages.early_exit.thresholds.limits import ExitSearchConfig, Limits
from edgewright.pipeline.stages.early_exit.thresholds.published import (
    geometric,
    geometric_schedules,
    greedy,
    published_steps,
)
from edgewright.pipeline.stages.early_exit.thresholds.search import OperatingPointResult, search_thresholds
from edgewright.pipeline.stages.early_exit.thresholds.trials import ExitEvaluator, Trials, candidate_thresholds

POLICIES = ("class_exclusion", "max_probability")


def network(exits: int, classes: int, policy: str) -> MultiExit:
    base = nn.Sequential(*(nn.Identity() for _ in range(exits + 1)))
    return MultiExit(base, [HeadSpec(str(i), classes) for i in range(exits)], [2] * exits, classes, policy)


def data(exits: int, rows: int = 300, classes: int = 5, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Logits that get better with depth, rows of different difficulty, and noise that exits share."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=generator)
    difficulty = 3.0 * torch.rand(rows, generator=generator)
    shared = torch.randn(rows, classes, generator=generator)
    logits = []
    for i in range(exits + 1):
        z = 0.7 * shared + 0.9 * torch.randn(rows, classes, generator=generator) - 1.5
        z[torch.arange(rows), targets] += 3.0 + 3.0 * (i + 1) / (exits + 1) - difficulty
        logits.append(z)
    return logits, targets


def macs_of(exits: int) -> list[int]:
    return [100 * (i + 1) + i * i for i in range(exits + 1)]


def search(
    exits: int, policy: str, seed: int = 0, rows: int = 300, classes: int = 5, **config: object
) -> tuple[list[OperatingPointResult], MultiExit, list[Tensor], Tensor]:
    logits, targets = data(exits, rows, classes, seed)
    model = network(exits, classes, policy)
    generator = torch.Generator().manual_seed(1)
    points = search_thresholds(model, logits, targets, macs_of(exits), ExitSearchConfig(**config), generator)
    return points, model, logits, targets


@pytest.mark.parametrize("policy", [*POLICIES, "class_exclusion_permanent"])
@pytest.mark.parametrize("exits", [1, 4])
@pytest.mark.parametrize("chunk", [1 << 20, 1 << 11])
def test_trials_equal_the_network_itself(policy: str, exits: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_trials, "_ELEMENTS_PER_CHUNK", chunk)
    logits, targets = data(exits, seed=exits)
    model, macs = network(exits, 5, policy), macs_of(exits)
    evaluator = ExitEvaluator(model.policy, logits, targets, macs)
    generator = torch.Generator().manual_seed(exits)
    values = [model.policy.never, 0.9, *torch.rand(20, generator=generator).tolist(), model.policy.always]
    for i in range(exits):
        start = torch.rand(exits, generator=generator).tolist()
        trials = evaluator.sweep(start, i, values)
        for t, value in enumerate(values):
            thresholds = [*start[:i], value, *start[i + 1 :]]
            output = model.decide(logits, torch.tensor(thresholds))
            right = output.label == targets
            assert trials.accuracy[t] == right.double().mean()
            per_class = [right[targets == c].double().mean() for c in range(5)]
            assert trials.worst_class_accuracy[t] == min(per_class)
            leaving = torch.bincount(output.exit_index, minlength=exits + 1)
            assert trials.shares[t].tolist() == (leaving.double() / 300).tolist()
            expected = sum(int(n) * m for n, m in zip(leaving, macs, strict=True)) / 300
            assert float(trials.mean_macs[t]) == pytest.approx(expected, rel=1e-12)
            assert trials.thresholds[t].tolist() == thresholds
            excluded = None
            state = torch.zeros(300, 5, dtype=torch.bool)
            for k in range(exits):
                excluded = model.policy.decide(logits[k], torch.tensor(thresholds[k]), excluded).excluded
                if excluded is not None:
                    state = torch.where((output.exit_index >= k)[:, None], excluded, state)
            assert trials.wrong_exclusions[t] == state.gather(1, targets[:, None]).double().mean()
            change = right.double() - (logits[-1].argmax(dim=1) == targets).double()
            assert float(trials.accuracy_error[t]) == pytest.approx(float(change.std(correction=0) / 300**0.5))


def assert_same(one: Trials, other: Trials) -> None:
    for name in Trials.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "classes"),
    [
        *((policy, n) for policy in ("class_exclusion", "class_exclusion_softmax") for n in (1, 2, 62, 64, 65, 130)),
        *(("max_probability", n) for n in (1, 2, 65)),
        ("entropy", 62),
    ],
)
def test_fast_trials_equal_the_policy_run_in_pytorch(
    policy: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, logits that round to the same probability, sigmoids that underflow, rows of NaN: all as the policy says."""
    monkeypatch.setattr(exit_masks, "_WORDS_PER_CHUNK", 800)
    monkeypatch.setattr(exit_masks, "_ELEMENTS_PER_DECISION", 100 * classes)
    monkeypatch.setattr(exit_masks, "_REMEMBERED_BYTES", 1 << 14)
    monkeypatch.setattr(exit_confidence, "_ELEMENTS_PER_DECISION", 100 * classes)
    monkeypatch.setattr(exit_confidence, "_ELEMENTS_PER_CHUNK", 700)
    monkeypatch.setattr(exit_confidence, "_REMEMBERED_BYTES", 3000)
    logits, targets = data(3, classes=classes)
    for z in logits:
        z[:40] = z[:40].round()
        z[40:50] -= 200.0
        z[50:60] *= 40.0
        z[60:65] = float("nan")
        z[65:70] = -1e30
        z[70:75, 0] = float("inf")
        z[75:140, -1] = z[75:140, 0] + 10.0 ** -torch.arange(4.0, 10.5, 0.1)  # 1e-4 to 1e-10 apart
    logits[-1][75:140, [0, -1]] *= 0.01
    logits[-1][75:140, 1:-1] -= 50.0
    targets[75:100], targets[100:140] = 0, classes - 1
    model, macs = network(3, classes, policy), macs_of(3)
    fast, general = (ExitEvaluator(model.policy, logits, targets, macs) for _ in range(2))
    assert fast.fast is not None
    general.fast = None
    # steps of the search, and others
    values = sorted([*candidate_thresholds(model.policy)[:: 5 if classes < 100 else 20], 1e-6, 0.0033, 0.123456, 1.0])
    generator = torch.Generator().manual_seed(classes)
    for i in [0, 1, 2] * 3:
        start = (torch.rand(3, generator=generator) ** 3).tolist()
        assert_same(fast.sweep(start, i, values), general.sweep(start, i, values))
    assert_same(fast.evaluate([0.0] * 3), general.evaluate([0.0] * 3))


@pytest.mark.parametrize("policy", ["class_exclusion", "max_probability"])
def test_the_search_takes_the_same_settings_fast_or_not(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tolerance": 0.02, "classes": 20, "rows": 150, "max_wrong_exclusion": 0.05, "restarts": 1}
    fast = search(3, policy, **config)[0]
    sweep = ExitEvaluator._sweep

    def slow(self: ExitEvaluator, *args: Any) -> Trials:
        self.fast = None
        return sweep(self, *args)

    monkeypatch.setattr(ExitEvaluator, "_sweep", slow)
    general = search(3, policy, **config)[0]
    assert [p.to_json() for p in fast] == [p.to_json() for p in general]
    assert all(torch.equal(one.trials, other.trials) for one, other in zip(fast, general, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("classes", [2, 5])
def test_one_exit_is_solved_by_both_searches_as_by_brute_force(policy: str, classes: int) -> None:
    logits, targets = data(1, classes=classes)
    model, macs = network(1, classes, policy), macs_of(1)
    plain = (model.decide(logits).label == targets).double().mean()

    def measure(threshold: float) -> tuple[float, float]:
        output = model.decide(logits, torch.tensor([threshold]))
        mean = torch.tensor(macs, dtype=torch.float64)[output.exit_index].mean()
        return float((output.label == targets).double().mean()), float(mean)

    for tolerance in (0.0, 0.01, 0.05):
        goal = float(plain) - tolerance - 1e-9
        found = {
            name: search(1, policy, classes=classes, search=name, tolerance=tolerance)[0][0]
            for name in ("greedy", "coordinate")
        }
        all_of_them = [measure(t) for t in candidate_thresholds(model.policy)]
        best = min(mean for accuracy, mean in all_of_them if accuracy >= goal)
        # a schedule's quantile may lie between two candidates and be better than both
        assert found["coordinate"].metrics["mean_macs"] <= best * (1 + 1e-12)
        assert found["coordinate"].metrics["accuracy"] >= goal
        kept = model.policy.never
        for threshold in published_steps(model.policy):
            if measure(threshold)[0] < goal:
                break
            kept = threshold
        assert found["greedy"].thresholds == (kept,)


def published_loop(model: MultiExit, logits: list[Tensor], targets: Tensor, segments: list[int], goal: float) -> list:
    """METHODS §2.5 as it is written, for class exclusion, with the first quirk repaired; one full pass a trial."""
    beta = [0.0] * len(segments)
    for i in sorted(range(len(segments)), key=lambda j: -segments[j]):
        step, accuracy = 1, 1.0
        while accuracy >= goal - 1e-9 and step <= 100:
            beta[i] = round(step / 100, 6)
            accuracy = float((model.decide(logits, torch.tensor(beta)).label == targets).double().mean())
            step += 1
        passed = step - 2 if accuracy < goal - 1e-9 else 100
        beta[i] = round(min(passed, 99) / 100, 6) if passed >= 1 else 0.0
    return beta


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exits", [2, 3, 5])
def test_greedy_is_the_published_loop(exits: int, seed: int) -> None:
    logits, targets = data(exits, seed=seed)
    model = network(exits, 5, "class_exclusion")
    macs = torch.tensor([7, 50, 20, 90, 10, 60])[: exits + 1].cumsum(0).tolist()
    segments = [macs[0], *(b - a for a, b in pairwise(macs))][:exits]
    plain = float((logits[-1].argmax(dim=1) == targets).double().mean())
    found = greedy(ExitEvaluator(model.policy, logits, targets, macs), Limits(plain - 0.02, None, None))
    assert found.thresholds[0].tolist() == published_loop(model, logits, targets, segments, plain - 0.02)


def test_greedy_switches_a_harmful_exit_off() -> None:
    """The release leaves it on at 0.01 (METHODS §2.5, quirk i)."""
    logits, targets = data(1)
    logits[0] = 8.0 * torch.nn.functional.one_hot((targets + 1) % 5, 5).float() - 8.0
    model = network(1, 5, "class_exclusion")
    plain = float((logits[-1].argmax(dim=1) == targets).double().mean())
    found = greedy(ExitEvaluator(model.policy, logits, targets, [1, 2]), Limits(plain - 0.01, None, None))
    assert found.thresholds.tolist() == [[0.0]] and found.accuracy == plain


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("exits", [2, 3, 6])
def test_points_keep_to_their_limits_and_coordinate_is_never_worse(policy: str, exits: int) -> None:
    for seed in range(1 if exits == 6 else 2):
        points, model, logits, targets = search(exits, policy, seed=seed, tolerance=0.01)
        plain = float((logits[-1].argmax(dim=1) == targets).double().mean())
        assert [p.name for p in points] == ["balanced", "accurate", "fast"]
        for point, allowed in zip(points, (0.01, 0.0, 0.03), strict=True):
            output = model.decide(logits, torch.tensor(point.thresholds))
            accuracy = float((output.label == targets).double().mean())
            assert point.metrics["accuracy"] == accuracy >= plain - allowed - 1e-9
            mean = torch.tensor(macs_of(exits), dtype=torch.float64)[output.exit_index].mean()
            assert point.metrics["mean_macs"] == pytest.approx(float(mean), rel=1e-12)
            assert point.metrics["mean_macs"] <= point.metrics["greedy_mean_macs"] + 1e-9
            shares = [point.metrics[f"exit_share_{i}"] for i in range(exits + 1)]
            assert sum(shares) == pytest.approx(1.0)
            assert point.trials.shape[1] == exits + 2
        balanced, accurate, fast = (p.metrics["mean_macs"] for p in points)
        assert fast <= balanced <= accurate


@pytest.mark.slow
def test_the_search_is_repeatable() -> None:
    one, other = (search(3, "class_exclusion", tolerance=0.01)[0] for _ in range(2))
    assert [p.to_json() for p in one] == [p.to_json() for p in other]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_every_exit_is_used_where_that_is_asked_for(policy: str) -> None:
    points, model, logits, _ = search(3, policy, tolerance=0.02, min_share=0.05)
    assert points[0].min_share_met
    output = model.decide(logits, torch.tensor(points[0].thresholds))
    assert (torch.bincount(output.exit_index, minlength=4) >= 0.05 * 300).all()
    impossible = search(3, policy, tolerance=0.0, min_share=0.26)[0]
    assert [p.min_share_met for p in impossible] == [False] * 3
    assert impossible[0].metrics["accuracy"] >= float(impossible[1].metrics["accuracy"]) - 1e-9


def test_the_worst_class_can_be_protected() -> None:
    free = search(2, "max_probability", seed=2, tolerance=0.1)[0][0]
    held, _, logits, targets = search(2, "max_probability", seed=2, tolerance=0.1, max_worst_class_drop=0.02)
    right = logits[-1].argmax(dim=1) == targets
    plain = min(float(right[targets == c].double().mean()) for c in range(5))
    assert free.metrics["worst_class_accuracy"] < plain - 0.02
    assert held[0].metrics["worst_class_accuracy"] >= plain - 0.02 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_large_splits_are_searched_on_a_sample_and_checked_on_all_rows(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_search, "_ELEMENTS_PER_SEARCH", 1000)
    monkeypatch.setattr(exit_search, "_ROWS_PER_SEARCH", 100)
    points, _, logits, targets = search(3, policy, rows=900, tolerance=0.01)
    plain = float((logits[-1].argmax(dim=1) == targets).double().mean())
    assert points[0].metrics["accuracy"] >= plain - 0.01 - 1e-9
    assert points[0].metrics["mean_macs"] <= points[0].metrics["greedy_mean_macs"] + 1e-9


def test_unusable_logits_and_configurations_are_refused() -> None:
    logits, targets = data(2)
    model = network(2, 5, "class_exclusion")
    config, generator = ExitSearchConfig(), torch.Generator()
    logits[1][17, 2] = float("nan")
    with pytest.raises(StageError, match=r"exit 1 are not finite on validation row 17 \(1 such rows\)"):
        search_thresholds(model, logits, targets, macs_of(2), config, generator)
    with pytest.raises(StageError, match="no rows"):
        search_thresholds(model, [x[:0] for x in logits], targets[:0], macs_of(2), config, generator)
    with pytest.raises(ValueError, match="min_share needs search: coordinate"):
        ExitSearchConfig(search="greedy", min_share=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["class_exclusion_softmax", "max_probability"])
def test_a_budget_is_kept_and_bought_better_than_as_published(policy: str) -> None:
    points, model, logits, targets = search(3, policy, tolerance=0.01, budgets=(0.4, 0.65))
    assert [p.name for p in points] == ["balanced", "accurate", "fast", "budget_40", "budget_65"]
    for point, budget in zip(points[3:], (0.4, 0.65), strict=True):
        output = model.decide(logits, torch.tensor(point.thresholds))
        mean = torch.tensor(macs_of(3), dtype=torch.float64)[output.exit_index].mean()
        assert float(mean) <= budget * macs_of(3)[-1] + 1e-6
        accuracy = float((output.label == targets).double().mean())
        assert point.metrics["accuracy"] == accuracy
        assert accuracy >= max(point.metrics["greedy_accuracy"], point.metrics["geometric_accuracy"]) - 1e-9
        assert max(point.metrics[f"{name}_mean_macs"] for name in ("greedy", "geometric")) <= budget * macs_of(3)[-1]
    assert points[3].metrics["accuracy"] <= points[4].metrics["accuracy"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_geometric_schedule_gives_every_exit_a_multiple_of_the_one_before(policy: str) -> None:
    logits, targets = data(2, rows=1000)
    evaluator = ExitEvaluator(network(2, 5, policy).policy, logits, targets, macs_of(2))
    schedules = geometric_schedules(evaluator, evaluator)
    even = min(schedules, key=lambda t: float((t.shares[0] - 1 / 3).abs().max()))
    assert even.shares[0].tolist() == pytest.approx([1 / 3] * 3, abs=0.005)
    for trials in schedules[:-1]:
        first, second, third = trials.shares[0].tolist()
        assert min(first, second, third) < 0.03 or second / first == pytest.approx(third / second, rel=0.1)
    budget = geometric(schedules, Limits(budget=0.7))
    assert 0.5 < float(budget.mean_cost[0]) <= 0.7
    plain = float(schedules[-1].accuracy[0])
    assert float(geometric(schedules, Limits(accuracy=plain - 0.01)).accuracy[0]) >= plain - 0.01


@pytest.mark.slow
def test_confidence_keeps_the_tolerance_on_rows_that_the_search_has_not_seen() -> None:
    """The cheapest of thousands of settings within the tolerance is there by luck; 12 searches on few rows each."""
    model, losses = network(2, 5, "class_exclusion_softmax"), {}
    held, own = data(2, 20000, 5, seed=99)
    evaluator = ExitEvaluator(model.policy, held, own, macs_of(2))
    plain = float(evaluator.evaluate([0.0] * 2).accuracy)
    for confidence in (None, 0.95):
        config = ExitSearchConfig(tolerance=0.02, restarts=0, confidence=confidence)
        lost = []
        for seed in range(12):
            logits, targets = data(2, 400, 5, seed)
            point, *_ = search_thresholds(model, logits, targets, macs_of(2), config, torch.Generator().manual_seed(0))
            lost.append(plain - float(evaluator.evaluate(point.thresholds).accuracy))
        losses[confidence] = lost
    few = evaluator.sample(torch.arange(1000)).evaluate([0.1, 0.3])
    again = ExitEvaluator(model.policy, [z[:1000] for z in held], own[:1000], macs_of(2)).evaluate([0.1, 0.3])
    assert float(few.accuracy_error) == pytest.approx(float(again.accuracy_error) / 20**0.5), (
        "of all rows, not the sample"
    )
    assert sum(x > 0.02 for x in losses[None]) >= 4
    assert sum(x > 0.02 for x in losses[0.95]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "geometric"])
def test_the_published_searches_keep_the_same_margin(method: str) -> None:
    logits, targets = data(2, 400, 5, 1)
    model = network(2, 5, "class_exclusion_softmax")
    for confidence in (None, 0.95):
        config = ExitSearchConfig(tolerance=0.02, search=method, confidence=confidence)
        point, *_ = search_thresholds(model, logits, targets, macs_of(2), config, torch.Generator().manual_seed(0))
        plain = float((logits[-1].argmax(dim=1) == targets).double().mean())
        lost = plain - point.metrics["accuracy"] + (1.6448 * point.metrics["accuracy_error"] if confidence else 0.0)
        assert lost <= 0.02 + 1e-4 and point.metrics["mac_share"] < 1.0


@pytest.mark.slow
def test_wrong_exclusions_can_be_limited() -> None:
    free = search(2, "class_exclusion", tolerance=0.1)[0][0]
    held, model, logits, targets = search(2, "class_exclusion", tolerance=0.1, max_wrong_exclusion=0.02)
    assert free.metrics["wrong_exclusions"] > 0.02 >= held[0].metrics["wrong_exclusions"]
    wrong = model.decide(logits, torch.tensor(held[0].thresholds)).scores.gather(1, targets[:, None]) == 0
    assert float(wrong.double().mean()) == held[0].metrics["wrong_exclusions"]


@lru_cache(maxsize=2)
def unequal(seed: int) -> tuple[list[Tensor], Tensor]:
    """As `data`, but early heads see class 0 worse than the others."""
    logits, targets = data(2, 3000, 5, seed)
    for z in logits[:-1]:
        z[targets == 0, 0] -= 1.5
    return logits, targets


@lru_cache(maxsize=8)
def on_rows_never_seen(**limit: object) -> dict[str, float]:
    """Searches on one set of rows with a loose tolerance and `limit`; the result and its losses on another set."""
    model, (logits, targets), (held, own) = network(2, 5, "class_exclusion_softmax"), unequal(1), unequal(2)
    config = ExitSearchConfig(**{"tolerance": 0.05, "restarts": 0, **limit})
    points = search_thresholds(model, logits, targets, macs_of(2), config, torch.Generator().manual_seed(0))
    chosen = points[-1 if config.budgets else 0]
    evaluator = ExitEvaluator(model.policy, held, own, macs_of(2))
    found, plain = evaluator.evaluate(chosen.thresholds), evaluator.evaluate([model.policy.never] * 2)
    return {
        "accuracy lost": float(plain.accuracy - found.accuracy),
        "worst class lost": float(plain.worst_class_accuracy - found.worst_class_accuracy),
        "wrongly excluded": float(found.wrong_exclusions),
        "cost": float(found.mean_cost),
        "missing share": 1.0 - float(found.shares.min()),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "what", "limit", "slack"),
    [
        ("tolerance", 0.01, "accuracy lost", 0.01, 0.01),
        ("max_worst_class_drop", 0.02, "worst class lost", 0.02, 0.03),
        ("max_wrong_exclusion", 0.02, "wrongly excluded", 0.02, 0.01),
        ("budgets", (0.5,), "cost", 0.5, 0.01),
        ("min_share", 0.3, "missing share", 0.7, 0.02),
    ],
)
def test_a_limit_holds_on_rows_that_the_search_has_not_seen(
    field: str, value: object, what: str, limit: float, slack: float
) -> None:
    """Up to what 600 rows of a class can tell; without the limit the same search is far outside."""
    free, held = (on_rows_never_seen(**fields)[what] for fields in ({}, {field: value}))
    assert held <= limit + slack < free


def test_a_latency_table_says_what_exits_cost(tmp_path: Path) -> None:
    """The first exit is slower than the second, whatever its MACs: nobody is sent there for nothing."""
    (tmp_path / "table.json").write_text(json.dumps({"exits": [99.0, 50.0, 100.0], "device": "board", "unit": "us"}))
    stage = {"name": "early_exit", "latency_table": "table.json", "tolerance": 0.05}
    recipe = parse_recipe({"model": "zoo:resnet_small", "task": "digits", "stages": [stage]}, tmp_path)
    config = recipe.stages[0].config
    assert isinstance(config, ExitSearchConfig) and config.latency_table is not None
    assert config.latency_table.exits == (99.0, 50.0, 100.0), "caches know the numbers, not only the path"
    assert parse_recipe(recipe.resolved(), tmp_path) == recipe
    fields = {"latency_table": config.latency_table, "tolerance": 0.05, "restarts": 0}
    slow = search(2, "max_probability", **fields)[0][0]
    usual = search(2, "max_probability", tolerance=0.05, restarts=0)[0][0]
    assert slow.metrics["mean_latency_us"] == pytest.approx(
        sum(slow.metrics[f"exit_share_{i}"] * us for i, us in enumerate((99, 50, 100)))
    )
    assert slow.metrics["exit_share_0"] == 0.0 < usual.metrics["exit_share_0"]
    assert slow.metrics["exit_share_1"] > usual.metrics["exit_share_1"]
    with pytest.raises(StageError, match="3 numbers for 3 exits and the network's end: 4 are needed"):
        search(3, "max_probability", **fields)
    for content, message in (("{", "is no JSON"), ("[]", "must be")):
        (tmp_path / "table.json").write_text(content)
        with pytest.raises(RecipeError, match=message):
            parse_recipe({"model": "zoo:resnet_small", "task": "digits", "stages": [stage]}, tmp_path)
