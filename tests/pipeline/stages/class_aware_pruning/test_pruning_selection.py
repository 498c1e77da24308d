from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgewright.pipeline.analysis.channels.flow import Axis, Call
from edgewright.pipeline.analysis.channels.groups import ChannelGroup, Channels
from edgewright.pipeline.stages.class_aware_pruning.config import ClassAwarePruningConfig
from edgewright.pipeline.stages.class_aware_pruning.criteria import UnitScores
from edgewright.pipeline.stages.class_aware_pruning.selection import Selection, select, smallest_macs, step_units


def chain(*widths: int, unit: int = 1) -> Channels:
    """Layers a, b, c ... that read each other; the last makes the output."""
    names = "abcdefgh"[: len(widths)]
    axes: dict[Axis, int] = {}
    groups, before = [], 3
    for i, (name, width) in enumerate(zip(names, widths, strict=True)):
        axes[(name, "in")], axes[(name, "out")] = before, width
        before = width
        if i + 1 < len(widths):
            channels = torch.arange(width).view(-1, unit)
            groups.append(ChannelGroup(name, (name,), {(name, "out"): channels, (names[i + 1], "in"): channels}))
    calls = {n: Call(9 * axes[(n, "in")] * axes[(n, "out")], 9) for n in names}
    return Channels(tuple(groups), {}, axes, calls)


def choose(channels: Channels, scores: dict[str, list[float]], limit: int | None = None, **fields: Any) -> Selection:
    config = ClassAwarePruningConfig(**fields)
    original = {g.name: g.units for g in channels.groups}
    given_scores = {
        name: UnitScores(torch.tensor(v).double(), torch.arange(len(v)).double(), torch.tensor(v).double())
        for name, v in scores.items()
    }
    return select(channels, given_scores, original, 10.0, limit, config)


def as_lists(removed: Any) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in removed.items()}


def test_threshold_and_cap_take_the_lowest_scores_of_all_layers() -> None:
    scores = {"a": [9.0, 1.0, 9, 9, 9, 9, 2.9, 9, 9, 9], "b": [9.0, 9, 9, 9, 9, 0.5, 9, 3.0, 9, 9]}
    channels = chain(10, 10, 4)
    both = choose(channels, scores, max_frac_per_iter=0.1)
    assert both.threshold == pytest.approx(3.0) and both.candidates == 3 and both.cap == 2
    assert as_lists(both.removed) == {"b": [5], "a": [1]}
    every = choose(channels, scores, mode="threshold_only")
    assert as_lists(every.removed) == {"b": [5], "a": [1, 6]}, "3.0 is not below 3.0"
    share = choose(channels, scores, mode="percent_only", max_frac_per_iter=0.25)
    assert share.threshold is None and sum(map(len, share.removed.values())) == 5
    assert as_lists(share.removed)["a"][:2] == [0, 1], "ties go by the smaller norm"


def test_nothing_below_the_threshold_is_no_candidate() -> None:
    assert not choose(chain(10, 4), {"a": [10.0] * 10}).removed


def test_layers_keep_their_least_width() -> None:
    low = {"a": [0.0] * 100, "b": [0.0] * 5}
    everything = choose(chain(100, 5, 2), low, mode="threshold_only", min_width=0.0)
    assert len(everything.removed["a"]) == 96 and len(everything.removed["b"]) == 1, "4 filters stay"
    shares = choose(chain(100, 5, 2), low, mode="threshold_only", min_width=0.3)
    assert len(shares.removed["a"]) == 70
    tiny = choose(chain(400, 3, 2), {"a": [0.0] * 400, "b": [0.0] * 3}, mode="threshold_only", min_width=0.0)
    assert len(tiny.removed["a"]) == 392 and "b" not in tiny.removed, "2 percent stay, and layers of 3 whole"


@pytest.mark.parametrize("round_to", [1, 2, 8])
@pytest.mark.parametrize("unit", [1, 2])
def test_widths_are_multiples(round_to: int, unit: int) -> None:
    channels = chain(40, 20, 4, unit=unit)
    found = choose(
        channels, {"a": [0.0] * (40 // unit), "b": [0.0] * (20 // unit)}, mode="percent_only", round_to=round_to
    )
    assert found.removed
    for name, units in found.removed.items():
        width = channels.widths[(name, "out")] - unit * len(units)
        assert width % round_to == 0


def test_target_profiles_take_coarser_steps_in_wider_layers() -> None:
    channels = chain(256, 100, 24, 4)
    zeros = {"a": [0.0] * 256, "b": [0.0] * 100, "c": [0.0] * 24}
    profiles = {
        "cpu": (16, 16, 8),
        "tensorrt": (32, 8, 8),
        "x86": (8, 8, 8),
        "x86_vnni": (16, 16, 8),
        None: (1, 1, 1),
    }
    for profile, multiples in profiles.items():
        found = choose(channels, zeros, mode="percent_only", max_frac_per_iter=0.7, round_to=profile)
        left = [channels.widths[(name, "out")] - len(found.removed.get(name, ())) for name in "abc"]
        assert left != [256, 100, 24]
        for width, multiple, before in zip(left, multiples, (256, 100, 24), strict=True):
            assert width % multiple == 0 or width == before, "rounded up, and never above what there was"


@pytest.mark.parametrize(("value", "reason"), [("x86_vni", "did you mean 'x86_vnni'"), (0, "1 or more"), ("0", "1 or")])
def test_what_is_no_multiple_is_refused(value: str | int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ClassAwarePruningConfig(round_to=value)
    assert ClassAwarePruningConfig(round_to="8").round_to == 8


def test_producers_of_different_widths_all_end_on_multiples() -> None:
    channels = chain(24, 24, 4)
    group = channels.groups[0]
    members = {("a", "out"): torch.arange(24).view(8, 3), ("b", "out"): torch.arange(16).view(8, 2)}
    coupled = ChannelGroup("a", ("a", "b"), members)
    config = ClassAwarePruningConfig(round_to=6)
    assert step_units(group, 24, config) == 6 and step_units(coupled, 8, config) == 6


def test_what_the_last_chunk_overshoots_stays() -> None:
    channels = chain(64, 64, 64, 4)
    scores = {name: torch.rand(64, generator=torch.Generator().manual_seed(i)).tolist() for i, name in enumerate("abc")}
    for round_to in (1, 16):
        limit = channels.macs({}) * 55 // 100
        found = choose(
            channels, scores, limit=limit, mode="threshold_only", target_mac_reduction=0.45, round_to=round_to
        )
        gone = {name: len(units) for name, units in found.removed.items()}
        assert channels.macs(gone) <= limit
        for name in gone:
            fewer = {**gone, name: gone[name] - round_to}
            assert channels.macs(fewer) > limit, f"{name} could have kept {round_to} more"


def test_equal_shares_spread_what_one_layer_would_lose() -> None:
    channels = chain(40, 20, 4)
    scores = {"a": [0.0] * 40, "b": [5.0] * 20}
    macs = channels.macs({})
    found = choose(channels, scores, limit=macs // 2, mode="threshold_only", target_mac_reduction=0.5)
    shares = {name: len(units) / channels.widths[(name, "out")] for name, units in found.removed.items()}
    assert abs(shares["a"] - shares["b"]) <= 0.05
    assert channels.macs({n: len(u) for n, u in found.removed.items()}) <= macs // 2
    loss = choose(
        channels,
        scores,
        limit=macs * 9 // 10,
        mode="threshold_only",
        target_mac_reduction=0.1,
        allocation="loss_per_mac",
    )
    assert set(loss.removed) == {"a"}, "what costs no loss goes first"


@given(
    widths=st.lists(st.integers(4, 40), min_size=2, max_size=5),
    target=st.floats(0.05, 0.9),
    round_to=st.sampled_from([1, 4]),
    allocation=st.sampled_from(["equal_share", "loss_per_mac"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_target_is_reached_with_nothing_to_spare(
    widths: list[int], target: float, round_to: int, allocation: str, seed: int
) -> None:
    channels = chain(*widths)
    config = {"target_mac_reduction": target, "round_to": round_to, "allocation": allocation, "mode": "threshold_only"}
    original = {g.name: g.units for g in channels.groups}
    limit = int((1 - target) * channels.macs({}))
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.units, generator=generator).tolist() for g in channels.groups}
    found = choose(channels, scores, limit=limit, **config)
    gone = {name: len(units) for name, units in found.removed.items()}
    least = smallest_macs(channels, original, ClassAwarePruningConfig(**config))  # type: ignore[arg-type]
    assert channels.macs(gone) <= max(limit, least)
    for name, units in found.removed.items():
        worst = sorted(range(original[name]), key=lambda i: scores[name][i])[: len(units)]
        assert sorted(worst) == units.tolist(), "within a layer the lowest scores go"


def test_iterations_arrive_where_one_step_arrives() -> None:
    channels = chain(32, 32, 4)
    limit = channels.macs({}) * 3 // 10
    scores: dict[str, Tensor] = {"a": torch.rand(32), "b": torch.rand(32)}
    original = {"a": 32, "b": 32}
    one = choose(
        channels,
        {n: s.tolist() for n, s in scores.items()},
        limit=limit,
        mode="threshold_only",
        target_mac_reduction=0.7,
    )
    now, kept = channels, {n: torch.arange(32) for n in scores}
    for _ in range(50):
        given_scores = {n: UnitScores(scores[n][kept[n]].double(), torch.zeros(len(kept[n])), kept[n]) for n in kept}
        config = ClassAwarePruningConfig(target_mac_reduction=0.7, max_frac_per_iter=0.1)
        step = select(now, given_scores, original, 1.0, limit, config)
        left = {
            n: torch.tensor([i for i in range(len(kept[n])) if i not in step.removed[n].tolist()]) for n in step.removed
        }
        now = now.narrowed(left)
        kept = {n: kept[n][left[n]] if n in left else kept[n] for n in kept}
        if now.macs({}) <= limit:
            break
    assert {n: sorted(set(range(32)) - set(k.tolist())) for n, k in kept.items()} == as_lists(one.removed)
