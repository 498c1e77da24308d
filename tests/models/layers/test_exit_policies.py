"""The exit policies: no influence between rows, memory, readmission, and the plain rule they stand for (METHODS §2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgewright.models.layers.exit_policies import POLICIES, ClassExclusion, Entropy, PermanentExclusion, policy_named
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit

QUIET = settings(deadline=None, max_examples=60)
NASTY = [0.0, -0.0, 1.0, 1.0, -3.5, 30.0, -30.0, 200.0, -200.0, 1e30, -1e30, math.inf, -math.inf, math.nan]


def network(exits: int, classes: int, policy: str) -> MultiExit:
    """Only its `decide` is used here."""
    base = nn.Sequential(*(nn.Identity() for _ in range(exits + 1)))
    return MultiExit(base, [HeadSpec(str(i), classes) for i in range(exits)], [2] * exits, classes, policy)


def random_logits(seed: int, exits: int, rows: int, classes: int, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, generator=generator) for _ in range(exits + 1)]


def exclusion_by_hand(logits: list[list[list[float]]], sigmoids: list[Tensor], betas: list[float]) -> tuple[int, int]:
    """METHODS §2.4 for one row, literally: favourite readmitted, strict comparison, memory."""
    classes = sigmoids[0].shape[0]
    m = [True] * classes
    for i, beta in enumerate(betas):
        q = [np.float32(x) for x in sigmoids[i].tolist()]
        a = max(range(classes), key=lambda c: q[c])
        m[a] = True
        m = [m[c] and bool(q[c] > np.float32(beta) * q[a]) for c in range(classes)]
        if sum(m) == 1:
            return m.index(True), i
    x = logits[-1]
    return max((c for c in range(classes) if m[c]), key=lambda c: x[c]), len(betas)


def confidence_by_hand(logits: list[list[float]], thetas: list[float]) -> tuple[int, int]:
    """METHODS §2.7 for one row, in double precision."""
    for i, theta in enumerate(thetas):
        top = max(logits[i])
        if 1.0 / sum(math.exp(x - top) for x in logits[i]) > theta:
            return logits[i].index(top), i
    return logits[-1].index(max(logits[-1])), len(thetas)


@QUIET
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([2, 3, 10]), st.data())
def test_class_exclusion_is_the_published_rule(seed: int, exits: int, classes: int, data: st.DataObject) -> None:
    betas = [data.draw(st.floats(0.01, 0.99)) for _ in range(exits)]
    logits = random_logits(seed, exits, 12, classes)
    output = network(exits, classes, "class_exclusion").decide(logits, torch.tensor(betas))
    for row in range(12):
        sigmoids = [torch.sigmoid(x)[row] for x in logits]
        label, left = exclusion_by_hand([x[row].tolist() for x in logits], sigmoids, betas)
        assert (int(output.label[row]), int(output.exit_index[row])) == (label, left)


@QUIET
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([2, 3, 10]), st.data())
def test_exclusion_on_the_softmax_is_the_same_rule_on_probabilities(
    seed: int, exits: int, classes: int, data: st.DataObject
) -> None:
    betas = [data.draw(st.floats(0.01, 0.99)) for _ in range(exits)]
    logits = random_logits(seed, exits, 12, classes)
    output = network(exits, classes, "class_exclusion_softmax").decide(logits, torch.tensor(betas))
    for row in range(12):
        probabilities = [torch.softmax(x.double(), dim=1)[row] for x in logits]
        label, left = exclusion_by_hand([x[row].tolist() for x in logits], probabilities, betas)
        assert (int(output.label[row]), int(output.exit_index[row])) == (label, left)


@QUIET
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([2, 3, 10]), st.data())
def test_max_probability_is_the_published_rule(seed: int, exits: int, classes: int, data: st.DataObject) -> None:
    thetas = [data.draw(st.floats(0.01, 0.999)) for _ in range(exits)]
    logits = random_logits(seed, exits, 12, classes)
    output = network(exits, classes, "max_probability").decide(logits, torch.tensor(thetas))
    for row in range(12):
        label, left = confidence_by_hand([x[row].tolist() for x in logits], thetas)
        assert (int(output.label[row]), int(output.exit_index[row])) == (label, left)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@QUIET
@given(st.data())
def test_rows_never_influence_each_other(policy: str, data: st.DataObject) -> None:
    exits, rows, classes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(2, 7))
    value = st.one_of(st.sampled_from(NASTY), st.floats(-20, 20, width=32))
    size = rows * classes
    logits = [
        torch.tensor(data.draw(st.lists(value, min_size=size, max_size=size))).view(rows, classes)
        for _ in range(exits + 1)
    ]
    thresholds = torch.tensor([data.draw(st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0])) for _ in range(exits)])
    model = network(exits, classes, policy)
    together = model.decide(logits, thresholds)
    alone = [model.decide([x[r : r + 1] for x in logits], thresholds) for r in range(rows)]
    assert torch.equal(together.label, torch.cat([a.label for a in alone]))
    assert torch.equal(together.exit_index, torch.cat([a.exit_index for a in alone]))
    assert torch.equal(together.scores.nan_to_num(-1.0), torch.cat([a.scores for a in alone]).nan_to_num(-1.0))
    assert torch.equal(together.scores.argmax(dim=1), together.label)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("exits", [1, 3, 6])
@pytest.mark.parametrize("classes", [2, 10])
def test_never_is_the_plain_network_and_always_leaves_at_once(policy: str, exits: int, classes: int) -> None:
    logits = random_logits(exits, exits, 500, classes)
    model = network(exits, classes, policy)
    assert torch.equal(model.thresholds, torch.full((exits,), model.policy.never)), "a fresh network never exits"
    plain = model.decide(logits)
    assert (plain.exit_index == exits).all()
    assert torch.equal(plain.label, logits[-1].argmax(dim=1))
    assert torch.equal(plain.scores, torch.softmax(logits[-1], dim=1))
    first = model.decide(logits, torch.full((exits,), model.policy.always))
    assert (first.exit_index == 0).all()
    assert torch.equal(first.label, logits[0].argmax(dim=1))
    last = model.decide(logits, torch.tensor([model.policy.never] * (exits - 1) + [model.policy.always]))
    assert (last.exit_index == exits - 1).all(), "each exit can be forced, whatever comes before"


def test_beta_zero_disables_an_exit_even_where_sigmoids_underflow() -> None:
    policy, zero = ClassExclusion(), torch.tensor(0.0)
    logits = torch.tensor([[-200.0, 3.0, -150.0], [-200.0, -200.0, -200.0], [200.0, -200.0, 0.0]])
    excluded, decided, _ = policy.decide(logits, zero, None)
    assert not decided.any() and excluded is not None and not excluded.any()
    before = torch.tensor([[True, False, False], [False, True, False], [True, False, False]])
    after, decided, _ = policy.decide(logits, zero, before)
    assert after is not None and not decided.any()
    assert not (after & ~before).any(), "nothing new is excluded"


@QUIET
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_what_is_excluded_comes_back_only_as_the_favourite(seed: int, beta: float) -> None:
    first, second = random_logits(seed, 1, 50, 6)
    policy = ClassExclusion()
    before = policy.decide(first, torch.tensor(0.6), None).excluded
    after, decided, scores = policy.decide(second, torch.tensor(beta), before)
    assert before is not None and after is not None
    favourite = torch.zeros_like(before).scatter(1, second.argmax(dim=1, keepdim=True), True)
    assert not (after & favourite).any()
    assert not (before & ~favourite & ~after).any()
    assert ((~after).sum(dim=1) >= 1).all(), "a row is never left without a class"
    assert torch.equal(decided, (~after).sum(dim=1) == 1)
    assert torch.equal(scores == 0.0, after)


def permanent_by_hand(logits: list[Tensor], betas: list[float]) -> tuple[int, int]:
    """What is out stays out; the favourite is the best of the rest."""
    left = list(range(len(logits[0])))
    for i, beta in enumerate(betas):
        q = torch.sigmoid(logits[i])
        best = max(float(q[c]) for c in left)
        left = [c for c in left if float(q[c]) >= float(np.float32(beta)) * best]
        if len(left) == 1:
            return left[0], i
    return max(left, key=lambda c: float(logits[-1][c])), len(betas)


@QUIET
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([2, 3, 10]), st.data())
def test_permanent_exclusion_is_its_plain_rule(seed: int, exits: int, classes: int, data: st.DataObject) -> None:
    betas = [data.draw(st.floats(0.01, 0.99)) for _ in range(exits)]
    logits = random_logits(seed, exits, 12, classes)
    output = network(exits, classes, "class_exclusion_permanent").decide(logits, torch.tensor(betas))
    for row in range(12):
        label, left = permanent_by_hand([x[row] for x in logits], betas)
        assert (int(output.label[row]), int(output.exit_index[row])) == (label, left)


@QUIET
@given(st.sampled_from([name for name, policy in POLICIES.items() if policy().classwise]), st.data())
def test_a_classwise_policy_is_known_from_nothing_and_everything_excluded(name: str, data: st.DataObject) -> None:
    """What the search packs: a class is out if it is out with no memory, or was out and is out with all excluded."""
    policy, generator = policy_named(name), torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    values = st.one_of(st.floats(-20, 20, width=32), st.sampled_from(NASTY))
    logits = torch.tensor(data.draw(st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=8)))
    before = torch.rand(logits.shape, generator=generator) < 0.5
    beta = torch.tensor(data.draw(st.floats(0, 1, width=32)))
    excluded, decided, _ = policy.decide(logits, beta, before)
    alone = policy.decide(logits, beta, None).excluded
    favourites = policy.decide(logits, torch.tensor(policy.never), torch.ones_like(before)).excluded
    assert excluded is not None and alone is not None and favourites is not None
    assert torch.equal(excluded, alone | (before & favourites))
    assert torch.equal(decided, (~excluded).sum(dim=1) == 1)


def test_permanent_exclusion_never_readmits_and_never_rules_all_out() -> None:
    policy, before = PermanentExclusion(), torch.tensor([[True, False, False], [True, True, False]])
    for beta in (0.0, 0.5, 1.0):
        after, decided, _ = policy.decide(torch.tensor([[9.0, -200.0, -2.0]] * 2), torch.tensor(beta), before)
        assert after is not None and (after | ~before).all() and not after.all(dim=1).any()
        assert decided[1]


def test_entropy_is_that_of_the_definition() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30], [1 / 3, 1 / 3, 1 / 3]])
    entropies = [1.0397207708 / math.log(3), 0.0, 1.0]
    for row, entropy in enumerate(entropies):
        for step, leaves in ((-1e-4, False), (1e-4, True)):
            decision = Entropy().decide(p[row : row + 1].log(), torch.tensor(entropy + step), None)
            assert bool(decision.decided) == leaves
            assert torch.allclose(decision.scores, p[row], atol=1e-6)


def test_a_larger_beta_excludes_more() -> None:
    logits = random_logits(3, 0, 200, 8)[0]
    sizes = [int(ClassExclusion().decide(logits, torch.tensor(b), None).excluded.sum()) for b in (0.0, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 200 * 7


def test_ties_stay_and_excluded_scores_are_exactly_zero() -> None:
    policy = ClassExclusion()
    _, decided, _ = policy.decide(torch.tensor([[2.0, 2.0, -9.0], [50.0, 40.0, 0.0]]), torch.tensor(1.0), None)
    assert decided.tolist() == [False, True], "float32 sigmoids of 40 and 50 are equal, their logits are not"
    scores = policy.finish(torch.tensor([[-1e30, 5.0, 4.0]]), torch.tensor([[False, True, False]]))
    assert scores[0, 1] == 0.0 and scores.argmax() == 2 and torch.isfinite(scores).all()
    everything = policy.finish(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]))
    assert torch.isfinite(everything).all()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nan_rows_stay_and_keep_their_nan(policy: str) -> None:
    logits = random_logits(0, 2, 4, 5)
    for x in logits:
        x[1] = math.nan
    model = network(2, 5, policy)
    output = model.decide(logits, torch.full((2,), model.policy.always))
    assert output.exit_index.tolist() == [0, 2, 0, 0]
    assert output.scores[1].isnan().all() and torch.isfinite(output.scores[[0, 2, 3]]).all()
    assert model.margins(logits, torch.full((2,), 0.5))[1] == 0.0


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decisions_are_taken_in_float32(name: str, dtype: torch.dtype) -> None:
    policy = policy_named(name)
    logits = random_logits(1, 0, 20, 4)[0].to(dtype)
    here = policy.decide(logits, torch.tensor(0.5), None)
    there = policy.decide(logits.to(torch.float32), torch.tensor(0.5), None)
    assert here.scores.dtype == torch.float32 and torch.equal(here.scores, there.scores)
    assert torch.equal(here.decided, there.decided)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@QUIET
@given(st.integers(0, 10**6), st.integers(1, 4), st.data())
def test_errors_below_the_margin_change_nothing(policy: str, seed: int, exits: int, data: st.DataObject) -> None:
    classes = data.draw(st.sampled_from([2, 5]))
    values = st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0])
    thresholds = torch.tensor([data.draw(values) for _ in range(exits)])
    model = network(exits, classes, policy)
    logits = random_logits(seed, exits, 40, classes, scale=2.0)
    margin = model.margins(logits, thresholds)
    assert (margin >= 0.0).all() and torch.isfinite(margin).all()
    before = model.decide(logits, thresholds)
    generator = torch.Generator().manual_seed(seed)
    radius = (0.99 * margin.clamp(max=5.0) - 1e-5).clamp(min=0.0)[:, None]
    for _ in range(8):
        moved = [x + radius * (2.0 * torch.rand(x.shape, generator=generator).round() - 1.0) for x in logits]
        after = model.decide(moved, thresholds)
        assert torch.equal(before.exit_index, after.exit_index)
        assert torch.equal(before.label, after.label)


def test_margins_know_what_cannot_flip() -> None:
    model = network(1, 3, "class_exclusion")
    logits = [torch.tensor([[4.0, 1.0, -2.0]]), torch.tensor([[3.0, -1.0, 0.0]])]
    plain = model.margins(logits, torch.tensor([0.0]))
    assert plain[0] == pytest.approx(1.5), "a disabled exit cannot flip, the label can: half of 3 - 0"
    forced = model.margins(logits, torch.tensor([1.0]))
    assert forced[0] == pytest.approx(1.5), "half of 4 - 1; the favourite itself is no distance of zero"
    half = model.margins(logits, torch.tensor([0.5]))
    gap = math.log(1 / (1 + math.exp(-1.0))) - math.log(1 / (1 + math.exp(-4.0))) - math.log(0.5)
    assert half[0] == pytest.approx(gap / 2), "in logarithms of the sigmoids"


def test_unknown_policies_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=rf"'entropie'.*{', '.join(sorted(POLICIES))}"):
        policy_named("entropie")


@pytest.mark.parametrize("policy", ["class_exclusion", "class_exclusion_permanent"])
@QUIET
@given(st.data())
def test_saturated_sigmoids_are_no_ties(policy: str, data: st.DataObject) -> None:
    """Beyond 17 float32 sigmoids are all 1: who is out stays out, only the class of the largest logit comes back."""
    classes = data.draw(st.integers(2, 6))
    values = st.floats(17.5, 80.0, width=32)
    logits = torch.tensor([data.draw(st.lists(values, min_size=classes, max_size=classes, unique=True))])
    before = torch.tensor([data.draw(st.lists(st.booleans(), min_size=classes, max_size=classes))])
    before[0, data.draw(st.integers(0, classes - 1))] = False
    made = policy_named(policy)
    after, decided, scores = made.decide(logits, torch.tensor(0.5), before)
    favourite = int(logits.argmax())
    expected = before.clone()
    if policy == "class_exclusion":
        expected[0, favourite] = False
    assert after is not None and torch.equal(after, expected)
    assert bool(decided) == (int(expected.sum()) == classes - 1)
    assert torch.equal(scores, 1.0 - expected.to(torch.float32))
    # `always` leaves the best of those that may stay, and the margin is that of the logits
    last = made.decide(logits, torch.tensor(1.0), before)
    left = logits.masked_fill(before, -math.inf) if policy == "class_exclusion_permanent" else logits
    assert bool(last.decided) and int(last.scores.argmax()) == int(left.argmax())
    if policy == "class_exclusion" and before.any():
        top = logits.topk(2).values[0]
        lead = float(top[0] - top[1])
        assert float(made.margin(logits, torch.tensor(0.5), before)) <= float(logits.max() - logits.min()) / 2
        if bool(before[0, favourite]):
            assert float(made.margin(logits, torch.tensor(0.5), before)) == pytest.approx(
                min(lead, math.log(2.0)) / 2, rel=1e-6
            )
