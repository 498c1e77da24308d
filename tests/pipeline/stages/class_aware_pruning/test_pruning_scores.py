from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pruning_models
import pytest
import torch
from tiny import CLASSES, tiny_residual, tiny_task
from torch import Tensor, nn

from edgewright.pipeline.analysis.channels.axes import filters
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.groups import ChannelGroup
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.stages.class_aware_pruning.criteria import CRITERIA, ScoredLayer, coupled_weights, unit_scores
from edgewright.pipeline.stages.class_aware_pruning.loss import modified_loss, orthogonality, penalty
from edgewright.pipeline.stages.class_aware_pruning.scored_samples import ScoredSamples, logit_gradients
from edgewright.pipeline.stages.class_aware_pruning.scores import (
    RELATIVE_TAU,
    FilterStatistics,
    ScoringSettings,
    collect,
)
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Batch
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.training import TrainingConfig

LAYERS = ["stem.0", "blocks.0.conv1", "blocks.1.conv1"]


def scored(
    model: nn.Module, tmp_path: Path, settings: ScoringSettings, layers: list[str] | None = None
) -> dict[str, FilterStatistics]:
    task = tiny_task()
    split = task.splits["calibration"]
    return collect(model, layers or LAYERS, ScoredSamples(task, split), settings, FolderContext(tmp_path))


def by_hand(model: nn.Module, layer: str, tmp_path: Path, images: int) -> tuple[Tensor, Tensor]:
    """sum_then_max and max_then_sum, one image at a time with plain cross entropy."""
    task = tiny_task()
    split, kept = task.splits["calibration"], list[Tensor]()
    module = model.get_submodule(layer)
    shares = []
    for label in range(CLASSES):
        rows = (split.targets == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=FolderContext(tmp_path).generator("scoring images", label))
        hits: list[Tensor] = []
        for row in rows[order[:images]].tolist():
            batch = split.batch([row])
            handle = module.register_forward_hook(lambda _m, _i, out: kept.append(out))
            loss = nn.functional.cross_entropy(model(*batch.inputs), batch.targets)
            handle.remove()
            activation = kept.pop()
            (gradient,) = torch.autograd.grad(loss, activation)
            hits.append((activation * gradient != 0).float()[0].flatten(1))
        shares.append(torch.stack(hits).mean(dim=0))
    return torch.stack(shares).sum(0).amax(1), torch.stack(shares).amax(2).sum(0)


def test_counts_are_those_of_single_images(tmp_path: Path) -> None:
    model = tiny_residual()
    both, apart = by_hand(model, "blocks.1.conv1", tmp_path, 5)
    released = scored(model, tmp_path, ScoringSettings(images_per_class=5))["blocks.1.conv1"]
    other = scored(model, tmp_path, ScoringSettings(images_per_class=5, agg="max_then_sum"))["blocks.1.conv1"]
    assert torch.allclose(released.class_count, both)
    assert torch.allclose(other.class_count, apart)
    assert bool((other.class_count >= released.class_count - 1e-6).all())
    assert released.per_class.shape == (CLASSES, 16)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("size", [1, 3, 4, 64])
def test_batches_that_do_not_divide_change_nothing(size: int, mode: str, tmp_path: Path) -> None:
    settings = ScoringSettings(images_per_class=7, tau=0.5 if mode == "relative" else 0.0, tau_mode=mode)  # type: ignore[arg-type]
    whole = scored(tiny_residual(), tmp_path, settings)
    parts = scored(tiny_residual(), tmp_path, replace(settings, batch_size=size))
    for path in LAYERS:
        assert torch.allclose(whole[path].class_count, parts[path].class_count, atol=1e-6)
        assert torch.allclose(whole[path].fisher, parts[path].fisher, rtol=1e-3, atol=1e-12)
        assert torch.allclose(whole[path].taylor, parts[path].taylor, rtol=1e-3, atol=1e-9)


def test_filter_behind_a_dead_normalisation_scores_exactly_zero(tmp_path: Path) -> None:
    model = tiny_residual()
    norm = model.get_submodule("blocks.1.bn1")
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, -0.5
    found = scored(model, tmp_path, ScoringSettings())["blocks.1.conv1"]
    assert found.class_count[3] == 0 and found.fisher[:, 3].eq(0).all()
    assert int((found.class_count == 0).sum()) < 16


def test_confident_sample_keeps_its_class(tmp_path: Path) -> None:
    model = tiny_residual()
    normal = scored(model, tmp_path, ScoringSettings(images_per_class=4))["blocks.1.conv1"]
    with torch.no_grad():
        # class 0 always wins by so much that its cross entropy is exactly 0
        model.fc.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    found = scored(model, tmp_path, ScoringSettings(images_per_class=4))["blocks.1.conv1"]
    assert bool((found.per_class[0] > 0).any()), "the class vanished from the counts"
    assert torch.equal(found.per_class[0] > 0, normal.per_class[0] > 0)
    assert bool(found.fisher[0].eq(0).all()), "its true gradient is zero, and so is its loss change"
    assert bool(found.fisher[1].gt(0).any())


def test_logit_gradients_are_those_of_the_cross_entropy() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    logits[5] = torch.tensor([0.0, 500.0, 0.0, 0.0])
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    direction, size = logit_gradients(logits, targets)
    leaf = logits.clone().requires_grad_()
    nn.functional.cross_entropy(leaf, targets, reduction="sum").backward()
    assert torch.allclose(direction * size[:, None], leaf.grad, atol=1e-7)
    assert size[5] == 0 and direction[5].tolist() == [0, 1, 0, 0]


def test_relative_tau_grades_networks_without_dead_units(tmp_path: Path) -> None:
    model = pruning_models.MODELS["transformer"]()
    layers = ["layers.0.up", "layers.2.up"]
    absolute = scored(model, tmp_path, ScoringSettings(tau_mode="absolute"), layers)
    relative = scored(model, tmp_path, ScoringSettings(tau=RELATIVE_TAU, tau_mode="relative"), layers)
    chosen = scored(model, tmp_path, ScoringSettings(), layers)
    for path in layers:
        assert bool((absolute[path].class_count == CLASSES).all())
        assert len(relative[path].class_count.unique()) > 4
        assert torch.equal(chosen[path].class_count, relative[path].class_count)
        assert chosen[path].relative_tau == RELATIVE_TAU and absolute[path].relative_tau is None


def test_tau_stays_absolute_behind_relu(tmp_path: Path) -> None:
    chosen = scored(tiny_residual(), tmp_path, ScoringSettings())
    plain = scored(tiny_residual(), tmp_path, ScoringSettings(tau_mode="absolute"))
    for path in LAYERS:
        assert chosen[path].relative_tau is None
        assert torch.equal(chosen[path].class_count, plain[path].class_count)


def test_autocast_inside_the_model_is_refused(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.conv(x)
            logits: Tensor = self.fc(x.float().mean(dim=(2, 3)))
            return logits

    with pytest.raises(StageError, match=r"layer 'conv' computes in torch.bfloat16"):
        scored(Inside(), tmp_path, ScoringSettings(), ["conv"])


def test_in_place_activation_does_not_change_the_scores(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 6, 3)
            self.act = nn.LeakyReLU(0.1, inplace=inplace)
            self.fc = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.act(self.conv(x)).mean(dim=(2, 3)))
            return logits

    one = scored(Plain(False).eval(), tmp_path, ScoringSettings(), ["conv"])["conv"]
    other = scored(Plain(True).eval(), tmp_path, ScoringSettings(), ["conv"])["conv"]
    assert torch.equal(one.class_count, other.class_count) and torch.equal(one.fisher, other.fisher)


def test_frozen_model_is_scored_and_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_residual().requires_grad_(False)
    found = scored(model, tmp_path, ScoringSettings())
    free = scored(tiny_residual(), tmp_path, ScoringSettings())
    assert all(torch.equal(found[p].class_count, free[p].class_count) for p in LAYERS)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_only_correct_leaves_wrong_images_out(tmp_path: Path) -> None:
    found = scored(tiny_residual(), tmp_path, ScoringSettings(only_correct=True))
    assert all(bool((f.per_class.amax(1) > 0).all()) for f in found.values()), "no class vanishes"


def test_half_precision_and_wrong_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="float32"):
        scored(tiny_residual().half(), tmp_path, ScoringSettings())
    with pytest.raises(StageError, match="logits"):
        scored(nn.Sequential(nn.Flatten(), nn.Linear(144, 7)), tmp_path, ScoringSettings(), ["1"])


def test_inputs_of_several_sizes_are_refused(tmp_path: Path) -> None:
    class Sizes:
        targets = torch.tensor([0, 1])
        sample_digests = (b"", b"")

        def __len__(self) -> int:
            return 2

        def batch(self, indices: Tensor) -> Batch:
            side = 8 if int(indices[0]) else 12
            return Batch((torch.randn(1, 1, side, side),), self.targets[indices])

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    context = FolderContext(tmp_path)
    with pytest.raises(StageError, match="inputs of one size"):
        task = ImageClassification({"calibration": Sizes()}, ["a", "b"])
        collect(model, ["0"], ScoredSamples(task, task.splits["calibration"]), ScoringSettings(), context)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_kind_of_layer(name: str) -> None:
    criterion = CRITERIA[name]
    assert criterion.name == name and criterion.full_scale(10) > 0
    layers = [nn.Conv2d(3, 5, 3), nn.Linear(4, 5), nn.ConvTranspose2d(3, 5, 2), nn.Conv2d(10, 5, 3, groups=5)]
    for layer in layers:
        statistics = FilterStatistics(torch.rand(5), torch.rand(3, 5), torch.rand(3, 5), torch.rand(3, 5))
        given = statistics if criterion.needs_statistics else None
        weights = (torch.rand(5).double(), torch.rand(5).double())
        alike = torch.rand(5, 5).double().triu(1) if criterion.needs_feature_maps else None
        alike = alike if alike is None else alike + alike.T
        found = [
            criterion.filter_scores(ScoredLayer("x", layer, given, torch.Generator().manual_seed(1), *weights, alike))
            for _ in range(2)
        ]
        assert found[0].shape == (5,) and bool((found[0] >= 0).all())
        assert torch.equal(found[0], found[1])


def test_weights_that_go_together_and_the_scale_behind_them() -> None:
    model = tiny_residual()
    channels = find_channels(model, (torch.zeros(1, 1, 12, 12),), prune_residual=True)
    modules = dict(model.named_modules())
    found = coupled_weights(channels.groups, modules)
    energy, scale = found["blocks.1.conv1"]
    own = model.get_submodule("blocks.1.conv1").weight.detach().double().flatten(1).square().sum(1)
    read = model.get_submodule("blocks.1.conv2").weight.detach().double().transpose(0, 1).flatten(1).square().sum(1)
    assert torch.allclose(energy, own + read)
    assert torch.allclose(scale, model.get_submodule("blocks.1.bn1").weight.detach().double().abs())
    stream = [f"blocks.{i}.conv2" for i in range(3)]
    assert torch.equal(found[stream[0]][0], found["stem.0"][0]), "members of a stream share their energy"
    together = sum(
        model.get_submodule(path).weight.detach().double().flatten(1).square().sum(1) for path in [*stream, "stem.0"]
    )
    reads = [*(f"blocks.{i}.conv1" for i in range(3)), "fc"]
    together = together + sum(
        model.get_submodule(path).weight.detach().double().transpose(0, 1).flatten(1).square().sum(1) for path in reads
    )
    assert torch.allclose(found["stem.0"][0], together)


def test_without_a_normalisation_the_scale_is_the_norm_of_the_filter() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    channels = find_channels(model, (torch.randn(1, 1, 12, 12),))
    _, scale = coupled_weights(channels.groups, dict(model.named_modules()))["1"]
    assert torch.allclose(scale, model[1].weight.detach().double().norm(dim=1))


def test_criteria_by_hand() -> None:
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]]))
    statistics = FilterStatistics(
        torch.tensor([2.0, 1.0, 0.5]), torch.zeros(2, 3), torch.tensor([[1.0, 2, 3], [3, 2, 1]]),
        torch.tensor([[1.0, 4, 9], [9, 4, 1]]),
    )  # fmt: skip
    energy, scale = torch.tensor([4.0, 9, 16]).double(), torch.tensor([1.0, 0, 2]).double()
    given = ScoredLayer("x", layer, statistics, torch.Generator(), energy, scale)
    expected = {
        "class_count": [2, 1, 0.5],
        "class_count_fisher": [10, 4, 2.5],
        "class_coverage": [(math.log(4 / 3) + math.log(4)) / 2, math.log(3 / 2), -math.log(1e-9)],
        "class_coverage_fpgm": [2, 0, 4],
        "fisher": [5, 4, 5],
        "taylor": [2, 2, 2],
        "l1": [7, 0, 14],
        "l2": [2, 3, 4],
        "fpgm": [20, 15, 25],
        "bn_scale": [1, 0, 2],
    }
    for name, values in expected.items():
        assert CRITERIA[name].filter_scores(given).tolist() == pytest.approx(values), name


def test_coverage_spares_the_filter_that_one_class_needs() -> None:
    # class 0 lives on filter 0 alone, the others share filters 1 ... 4 and have larger gradients
    effect = torch.zeros(6, 5)
    effect[0, 0] = 0.01
    effect[1:, 1:] = 1.0 + 0.1 * torch.arange(4)
    statistics = FilterStatistics(torch.ones(5), torch.ones(6, 5), effect, effect.square())
    weights = (torch.ones(5).double(), torch.ones(5).double())
    layer = ScoredLayer("x", nn.Linear(2, 5), statistics, torch.Generator(), *weights)
    assert int(CRITERIA["taylor"].filter_scores(layer).argmin()) == 0
    scores = CRITERIA["class_coverage"].filter_scores(layer)
    assert scores.argsort().tolist() == [1, 2, 3, 0, 4], "as long as the others have one left"
    assert bool((scores.sort().values.diff() >= 0).all())
    dead = FilterStatistics(torch.ones(5), torch.ones(6, 5), torch.zeros(6, 5), torch.zeros(6, 5))
    nothing = ScoredLayer("x", nn.Linear(2, 5), dead, torch.Generator(), *weights)
    assert CRITERIA["class_coverage"].filter_scores(nothing).tolist() == [0.0] * 5


def test_filters_of_a_grouped_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    x = torch.randn(1, 4, 1, 1)
    rows = filters(layer)
    expected = [float(rows[o] @ (x[0, :2] if o < 3 else x[0, 2:]).flatten()) for o in range(6)]
    assert torch.allclose(layer(x).flatten(), torch.tensor(expected), atol=1e-6)


def test_orthogonality_by_hand() -> None:
    kernel = torch.zeros(2, 1, 3, 3)
    kernel[0, 0, 1, 1], kernel[1, 0, 1, 1] = 1.0, 2.0
    # products at the centre: [[1, 2], [2, 4]]; minus the identity: [[0, 2], [2, 3]]
    assert float(orthogonality(kernel)) == pytest.approx(17**0.5)
    assert orthogonality(kernel, padding=2).shape == ()
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 0] = corner[0, 0, 2, 2] = 0.5**0.5
    # the shift by two overlaps only with padding 2: 0.5 twice
    assert float(orthogonality(corner, padding=1)) == pytest.approx(0.0, abs=1e-6)
    assert float(orthogonality(corner, padding=2)) == pytest.approx(0.5**0.5)


def test_orthogonality_has_a_floor_where_filters_outnumber_their_size_and_finite_gradients() -> None:
    kernel = torch.randn(64, 3, 3, 3).requires_grad_()
    value = orthogonality(kernel)
    assert float(value.detach()) > (64 - 27) ** 0.5
    value.backward()
    assert kernel.grad is not None and bool(torch.isfinite(kernel.grad).all())
    exact = torch.zeros(1, 1, 3, 3)
    exact[0, 0, 1, 1] = 1.0
    exact.requires_grad_()
    orthogonality(exact).backward()
    assert exact.grad is not None and bool((exact.grad == 0).all())


def test_penalty_sums_over_the_right_layers() -> None:
    model = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(3)])
    absolute = sum(float(p.detach().abs().sum()) for p in model.parameters())
    assert penalty(model, 1.0, 0.0).item() == pytest.approx(absolute, rel=1e-5)
    assert penalty(model, 0.0, 2.0).item() == pytest.approx(2 * orthogonality(model[0].weight).item(), rel=1e-5)
    assert penalty(model, 0.0, 0.0).item() == 0.0


def test_modified_loss_is_the_tasks_plus_the_penalty() -> None:
    model, task = tiny_residual(), tiny_task()
    batch = task.splits["train"].batch(list(range(8)))
    plain = task.loss(model(*batch.inputs), batch.targets)
    value = modified_loss(task, TrainingConfig(), 1e-4, 1e-2, 1)(model, batch)
    assert float(value.detach()) == pytest.approx(float(plain.detach() + penalty(model, 1e-4, 1e-2).detach()), rel=1e-5)


def test_one_filter_that_is_needed_keeps_its_whole_unit() -> None:
    """Units of two filters in each of two coupled layers: the largest of the four scores is the unit's."""
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Linear(3, 4)))
    channels = torch.tensor([[0, 1], [2, 3]])
    group = ChannelGroup("a", ("a", "b"), {("a", "out"): channels, ("b", "out"): channels})
    scores = {"a": torch.tensor([1.0, 7.0, 3.0, 2.0]), "b": torch.tensor([2.0, 3.0, 0.5, 4.0])}
    assert unit_scores(group, scores, {}, model).score.tolist() == [7.0, 4.0]
    assert unit_scores(group, {**scores, "a": torch.zeros(4)}, {}, model).score.tolist() == [3.0, 4.0]
