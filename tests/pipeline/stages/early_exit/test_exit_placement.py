"""Where exits may sit on networks of any shape, and what leaving there costs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from tiny import CLASSES, tiny_residual, tiny_task, tiny_transformer
from torch import Tensor, nn

from edgewright.export.accounts.exit_costs import exit_macs
from edgewright.models.layers.exit_policies import policy_named
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.pipeline.errors import RecipeError, StageError
from edgewright.pipeline.stages.early_exit import automatic_places as exit_auto
from edgewright.pipeline.stages.early_exit.automatic_places import boundaries, choose_subset
from edgewright.pipeline.stages.early_exit.placement import choose_places, places
from edgewright.pipeline.stages.early_exit.thresholds.limits import ExitSearchConfig
from edgewright.pipeline.stages.early_exit.thresholds.search import ThresholdSearch, default_limits
from edgewright.pipeline.stages.early_exit.thresholds.trials import ExitEvaluator

IMAGE = (torch.zeros(1, 1, 12, 12),)


class Odd(nn.Module):
    """Modules that cannot carry an exit, each for another reason, beside some that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.pair = _Pair()
        self.table = _Table()
        self.folded = _Folded()
        self.unused = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.pair(self.twice(self.twice(self.first(x))))
        logits: Tensor = self.last(y + self.table(y) + self.folded(y))
        return logits


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _Table(nn.Module):
    """A position embedding: the same for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.values


class _Folded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 3).sum(dim=1, keepdim=True).view(-1, 2).sum(dim=1, keepdim=True)


class Sound(nn.Module):
    """One-dimensional convolutions: features are axis 1 of [N, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 5, 3, padding=1)
        self.act = nn.GELU()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.act(self.conv1(x))).mean(dim=2))
        return logits


def network(base: nn.Module, at: list[str], inputs: tuple[Tensor, ...], classes: int, pool: int = 1) -> MultiExit:
    chosen = choose_places(base, inputs, at, ())
    specs, dims = [place.head(pool) for place in chosen], [len(place.shape) for place in chosen]
    return MultiExit(base, specs, dims, classes, "class_exclusion").eval()


def test_macs_of_each_exit_count_what_ran_and_every_head_passed() -> None:
    model = network(tiny_residual(), ["blocks.0", "stem", "blocks.1"], IMAGE, CLASSES)
    assert [spec.at for spec in model.specs] == ["stem", "blocks.0", "blocks.1"], "in order of depth"
    stem, block, head = 144 * 9 * 8, 2 * 144 * 9 * 8 * 16, 8 * CLASSES
    half = 36 * 9 * 8 * 16 * 2
    at = [stem, stem + block, stem + block + half]
    assert exit_macs(model, tiny_task(), "test") == [
        at[0] + head,
        at[1] + 2 * head,
        at[2] + 3 * head,
        at[2] + half + 8 * CLASSES + 3 * head,
    ]


def test_a_pooled_head_is_charged_for_its_width_and_shrinks_to_the_map() -> None:
    model = network(tiny_residual(), ["stem", "blocks.1"], IMAGE, CLASSES, pool=4)
    assert [spec.pool for spec in model.specs] == [4, 3], "6 is not divisible by 4"
    assert model.head(0).linear.in_features == 8 * 16
    assert exit_macs(model, tiny_task(), "test")[0] == 144 * 9 * 8 + 8 * 16 * CLASSES
    assert [tuple(z.shape) for z in model.all_logits(torch.randn(2, 1, 12, 12))] == [(2, CLASSES)] * 3


@pytest.mark.parametrize("build", [tiny_residual, tiny_transformer])
def test_shares_find_distinct_places_in_order(build) -> None:
    model = build()
    chosen = choose_places(model, IMAGE, (), (0.75, 0.25, 0.5))
    macs = [place.macs for place in chosen]
    assert len(chosen) == 3 and macs == sorted(set(macs))
    assert [place.path for place in choose_places(model, IMAGE, (), (0.68,))] == [
        "blocks.0" if build is tiny_residual else "layers.1"
    ], "a whole block, not a layer inside it"
    assert len(choose_places(model, IMAGE, (), tuple(i / 60 for i in range(1, 60)))) < 59, "as many as there are"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "expected", "axis"),
    [
        ("resnet18", 64, ["layer1", "layer2", "layer3"], 1),
        ("swin_t", 64, ["features.4", "features.5.3", "features.6"], 3),
        ("vit_b_16", 32, [f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)], 2),
    ],
)
def test_networks_of_torchvision_get_exits_between_their_blocks(name, size, expected, axis) -> None:
    torch.manual_seed(0)
    build = getattr(torchvision.models, name)
    model = (build(image_size=size) if name.startswith("vit") else build()).eval()
    inputs = (torch.zeros(1, 3, size, size),)
    chosen = choose_places(model, inputs, (), (0.25, 0.5, 0.75))
    assert [place.path for place in chosen] == expected
    assert {place.axis for place in chosen} == {axis}
    network_with_exits = network(model, expected, inputs, 10)
    assert [z.shape[1] for z in network_with_exits.all_logits(torch.randn(2, 3, size, size))[:-1]] == [10] * 3


def test_features_of_sound_are_channels_not_time() -> None:
    inputs = (torch.zeros(1, 2, 40),)
    model = network(Sound(), ["act"], inputs, 4)
    assert (model.specs[0].features, model.specs[0].axis) == (8, 1)
    assert model.all_logits(torch.randn(3, 2, 24))[0].shape == (3, 4), "any length"


def test_children_that_return_the_tensor_of_their_container_are_places_too() -> None:
    found = places(tiny_residual(), IMAGE)
    assert found["stem.2"].macs == found["stem"].macs
    assert found["stem.2"].shape == (1, 8, 12, 12)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("twice", "it runs 2 times"),
        ("pair", "its output is a tuple"),
        ("table", "does not depend on the batch"),
        ("unused", "it does not run in forward"),
        ("last", "nothing is left to save"),
    ],
)
def test_places_that_cannot_carry_an_exit_say_why(path: str, reason: str) -> None:
    with pytest.raises(StageError, match=rf"'{path}'.*{reason}.*near it are '"):
        choose_places(Odd().eval(), (torch.zeros(1, 4),), [path], ())


def test_paths_that_do_not_exist_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no module 'block\.1'.*'blocks\.1'"):
        choose_places(tiny_residual(), IMAGE, ["block.1"], ())
    with pytest.raises(RecipeError, match="twice"):
        choose_places(tiny_residual(), IMAGE, ["stem", "stem"], ())
    with pytest.raises(RecipeError, match=r"no MAC lies between 'stem\.2' and 'stem'"):
        choose_places(tiny_residual(), IMAGE, ["stem", "stem.2"], ())


def test_a_model_without_a_place_gets_none() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    assert choose_places(flat, IMAGE, (), (0.5,)) == []
    with pytest.raises(StageError, match=r"early_exit\.at: no exit can sit at '1'"):
        choose_places(flat, IMAGE, ("1",), ())
    with pytest.raises(StageError, match="no module of Linear can carry an exit"):
        choose_places(nn.Linear(4, 4), (torch.zeros(1, 4),), ("1",), ())


def test_boundaries_are_where_one_tensor_knows_all_of_an_input() -> None:
    found = [place.path for place in boundaries(tiny_residual(), (torch.randn(4, 1, 12, 12),))]
    # not inside a block, where the shortcut goes past; the last block is the end of `blocks`
    assert found == ["stem", "blocks.0", "blocks.1"]
    sequence = [place.path for place in boundaries(tiny_transformer(), (torch.randn(4, 1, 12, 12),))]
    assert sequence[0] == "embed" and {"layers.0", "layers.1"} <= set(sequence)
    assert not any("attention.q" in path or path.endswith("norm2") for path in sequence)


def test_a_mask_goes_past_every_boundary() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = torch.relu(self.one(self.embed(ids)) * mask[:, :, None])
            x = x + self.two(x) * mask[:, :, None]
            logits: Tensor = self.fc(x.mean(dim=1))
            return logits

    torch.manual_seed(0)
    inputs = (torch.arange(12).view(2, 6) % 9, torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]))
    assert [place.path for place in boundaries(Masked().eval(), inputs)] == ["one"]


@pytest.mark.slow
def test_the_subset_is_the_one_that_saves_most() -> None:
    """Five candidates of which only the second and the fourth see the classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (400,), generator=generator)
    right = 6.0 * nn.functional.one_hot(targets, 4).float()
    noise = [torch.randn(400, 4, generator=generator) for _ in range(6)]
    easy = (torch.rand(400, generator=generator) < 0.5)[:, None]
    logits = [noise[0], right * easy + noise[1], noise[2], right + noise[3], right + noise[4], right + noise[5]]
    macs, heads = [10, 20, 40, 50, 90, 100], [1] * 5

    def limits(evaluator):
        return default_limits(evaluator, ExitSearchConfig(tolerance=0.02))

    policy = policy_named("max_probability")
    found = choose_subset(policy, logits, targets, macs, heads, 2, limits)
    assert found.chosen == (1, 3) and found.within and found.tried == 10
    assert found.mean_cost < 0.55
    alone = choose_subset(policy, logits, targets, macs, heads, 1, limits)
    assert alone.mean_cost >= found.mean_cost
    most = choose_subset(policy, logits, targets, macs, heads, 9, limits)
    assert {1, 3} <= set(most.chosen) and most.tried == 1, "no more than there are"
    assert 4 not in most.chosen, "nearly all rows are right before it: it takes none and is left out"
    assert most.mean_cost < alone.mean_cost
    shares = chances(policy, logits, targets, macs, heads, most.chosen, limits)
    assert all(share > 0.0 for share in shares[:-1])


def chances(policy, logits, targets, macs, heads, chosen, limits) -> list[float]:
    """Shares of the rows at these exits and the end, thresholds searched as the stage does."""
    passed = [sum(heads[c] for c in chosen[: i + 1]) for i in range(len(chosen))]
    costs = [macs[c] + h for c, h in zip(chosen, passed, strict=True)]
    all_logits = [*(logits[c] for c in chosen), logits[-1]]
    evaluator = ExitEvaluator(policy, all_logits, targets, [*costs, macs[-1] + passed[-1]])
    bound = limits(evaluator)
    search = ThresholdSearch(evaluator, 0, torch.Generator().manual_seed(0))
    return search.run(bound, search.published(bound).values()).shares[0].tolist()


@pytest.mark.slow
def test_many_subsets_are_searched_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(3, (200,), generator=generator)
    depth = [k / 5 for k in range(6)]
    logits = [
        4.0 * d * nn.functional.one_hot(targets, 3).float() + torch.randn(200, 3, generator=generator) for d in depth
    ]
    fields = (policy_named("entropy"), logits, targets, [10 * (k + 1) for k in range(6)], [1] * 5, 2)

    def limits(evaluator):
        return default_limits(evaluator, ExitSearchConfig(tolerance=0.05))

    exact = choose_subset(*fields, limits)
    monkeypatch.setattr(exit_auto, "_SUBSETS", 1)
    stepwise = choose_subset(*fields, limits)
    assert exact.tried == 10 and exact.mean_cost <= stepwise.mean_cost
    assert stepwise.within and 1 <= len(stepwise.chosen) <= 2
