from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from tiny import tiny_residual, tiny_transformer
from torch import nn

from edgewright.pipeline.analysis.layers import discover
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.stages.basis_sharing.factorization import Metric, metric_of
from edgewright.pipeline.stages.basis_sharing.grouping import Candidate, GroupMode, candidates, divide, select
from edgewright.pipeline.stages.basis_sharing.norms import Calibration
from edgewright.pipeline.stages.basis_sharing.solver import Algebra, Budget, divided, factorized_macs, passes

IMAGE = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
BLOCK = "layers.{}.{}"


def names(found: list[Candidate]) -> list[list[str]]:
    return [[layer.path for layer in candidate.members] for candidate in found]


def groups_of(model: nn.Module, mode: GroupMode, size: int = 2) -> list[list[str]]:
    graph = discover(model, [IMAGE])
    layers, _ = select(graph, (), (), 1)
    return names(candidates(layers, mode, size))


def qkv(*layers: int) -> list[str]:
    return [f"layers.{i}.attention.{name}" for i in layers for name in "qkv"]


def test_groups_of_a_transformer() -> None:
    model = tiny_transformer()
    assert all(len(group) == 1 for group in groups_of(model, "matrix"))
    readers = groups_of(model, "readers")
    assert [group for group in readers if len(group) > 1] == [qkv(0), qkv(1), qkv(2)]
    layers = groups_of(model, "layers")
    assert ["layers.0.attention.q", "layers.1.attention.q"] in layers
    assert ["layers.2.attention.q"] in layers
    both = groups_of(model, "readers_and_layers")
    assert both == [
        ["embed"],
        qkv(0, 1),
        *[[f"layers.0.{name}", f"layers.1.{name}"] for name in ("attention.o", "up", "down")],
        qkv(2),
        *[[f"layers.2.{name}"] for name in ("attention.o", "up", "down")],
    ]
    assert qkv(0, 1, 2) in groups_of(model, "readers_and_layers", size=3)


def test_groups_of_a_residual_network_leave_stem_and_classifier() -> None:
    assert groups_of(tiny_residual(), "readers_and_layers", size=3) == [
        [f"blocks.{i}.conv1" for i in range(3)],
        [f"blocks.{i}.conv2" for i in range(3)],
    ]


@pytest.mark.parametrize("mode", ["matrix", "layers", "readers", "readers_and_layers"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_layer_is_in_one_group_of_one_shape(mode: GroupMode, size: int) -> None:
    for model in (tiny_transformer(), tiny_residual()):
        layers, _ = select(discover(model, [IMAGE]), (), (), 1)
        found = candidates(layers, mode, size)
        flat = [path for group in names(found) for path in group]
        assert sorted(flat) == sorted(layer.path for layer in layers)
        for candidate in found:
            assert len({layer.shape_class for layer in candidate.members}) == 1


def test_readers_with_other_kernels_are_apart() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 1)
            self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 9, 1, stride=2)
            self.c = nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(6 + 9 + 8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            parts = [m(x).mean(dim=(2, 3)) for m in (self.a, self.b, self.c)]
            out: torch.Tensor = self.head(torch.cat(parts, dim=1))
            return out

    assert groups_of(Fork(), "readers") == [["a", "b"], ["c"]]


def test_selection_by_pattern() -> None:
    graph = discover(tiny_residual(), [IMAGE])

    def chosen(include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), width: int = 1) -> list[str]:
        return [layer.path for layer in select(graph, include, exclude, width)[0]]

    assert chosen(include=("*.conv1",)) == [f"blocks.{i}.conv1" for i in range(3)]
    assert chosen(exclude=("blocks.1.*", "*.conv2")) == ["blocks.0.conv1", "blocks.2.conv1"]
    assert chosen(include=("*",)) == chosen(), "a pattern does not name stem and classifier"
    assert chosen(include=("stem.0", "fc")) == ["stem.0", "fc"]
    assert chosen(width=8) == chosen()
    assert chosen(width=9) == chosen(include=("*.conv1",)), "the second convolutions have 8 outputs"
    assert chosen(width=17) == []
    left = {s.path: s.reason for s in select(graph, (), ("blocks.0.*",), 1)[1]}
    assert left == {
        "stem.0": "the stem",
        "blocks.0.conv1": "excluded by the recipe",
        "blocks.0.conv2": "excluded by the recipe",
        "fc": "gives the logits",
    }
    with pytest.raises(StageError, match=r"'blokcs\.\*'.*matches no Linear, Conv1d or Conv2d.*'blocks\.0\.conv1'"):
        chosen(include=("blokcs.*",))


def _candidate(size: int = 2) -> Candidate:
    layers, _ = select(discover(tiny_transformer(), [IMAGE]), (), (), 1)
    return next(c for c in candidates(layers, "readers_and_layers", size) if len(c.rows[0]) == 3)


def test_division_takes_the_cheapest_way_to_cut() -> None:
    candidate = _candidate()
    cost = {6: 10.0, 3: 6.0, 2: 2.0, 1: 5.0}
    division = divide(candidate, lambda group: cost[len(group.members)])
    assert names(list(division.groups)) == [[f"layers.{i}.attention.{n}" for i in (0, 1)] for n in "qkv"]
    assert (division.error, division.joint_error, division.separate_error) == (6.0, 10.0, 6.0)
    cost[6] = 5.9
    assert names(list(divide(candidate, lambda group: cost[len(group.members)]).groups)) == [qkv(0, 1)]
    single = divide(Candidate(candidate.rows[:1]).splits()[0][0], lambda group: cost[len(group.members)])
    assert (single.error, single.separate_error) == (5.0, None)


def _algebra(matrices: dict[str, torch.Tensor], norm: Metric) -> Algebra:
    return Algebra(matrices, dict.fromkeys(matrices, norm), matrices, "per_layer")


def _solved(similar: bool) -> list[list[str]]:
    candidate = _candidate()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 16, generator=g, dtype=torch.float64)
    space = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
    norm = metric_of(x.T @ x)
    matrices = {}
    for i, layer in enumerate(candidate.members):
        # three directions each, all the same or none the same; rank 3 apart leaves nothing, and one basis of the
        # same bytes has rank 6
        columns = space[:, :3] if similar else space[:, [i, (i + 5) % 16, 15 - i]]
        private = columns @ torch.randn(3, 16, generator=g, dtype=torch.float64)
        matrices[layer.path] = private + 0.05 * torch.randn(16, 16, generator=g, dtype=torch.float64)
    budget = Budget(lambda _: Fraction(2, 5), align=1)
    algebra = _algebra(matrices, norm)
    division = divided(candidate, algebra, budget, "auto")
    assert names(list(divided(candidate, algebra, budget, "always").groups)) == [qkv(0, 1)]
    found = [algebra.factors(group, budget.rank(group, Fraction(2, 5)) or 0) for group in division.groups]
    for group, factors in zip(division.groups, found, strict=True):
        assert factors.rank * (16 + 16 * len(group.members)) <= 0.4 * 256 * len(group.members)
        assert algebra.error(group, factors.rank) == pytest.approx(factors.error, rel=1e-6)
    assert sum(factors.error for factors in found) == pytest.approx(division.error, rel=1e-6)
    return names(list(division.groups))


def test_similar_layers_share_and_unlike_ones_do_not() -> None:
    assert _solved(similar=True) == [qkv(0, 1)]
    assert all(len(group) < 6 for group in _solved(similar=False))


def test_ranks_that_save_nothing_leave_layers_dense() -> None:
    candidate = _candidate()
    eye = torch.eye(16, dtype=torch.float64)
    algebra = _algebra({layer.path: eye for layer in candidate.members}, metric_of(eye))
    for share, saves in ((Fraction(15, 16), True), (Fraction(1), False), (Fraction(6, 5), False)):
        budget = Budget(lambda _, share=share: share, 1)  # type: ignore[misc]
        ranks = [budget.rank(group, share) for group in divided(candidate, algebra, budget, "auto").groups]
        assert all((rank is not None) == saves for rank in ranks), "who keeps everything stays dense"


def test_ranks_are_aligned_only_where_little_is_lost() -> None:
    layer = _candidate().members[0]

    def rank(width: int, align: int | None) -> int | None:
        group = Candidate(((replace(layer, input_width=width, output_width=width),),))
        return Budget(lambda _: Fraction(1, 2), align).rank(group, Fraction(1, 2))

    assert rank(100, None) == 25
    assert rank(300, None) == 72
    assert rank(300, 1) == 75
    assert rank(100, 8) == 24
    # below the alignment nothing is rounded: 1 in place of 4 would not be the ratio that was asked for
    assert rank(16, 8) == 4


def test_calibration_passes_hold_a_bounded_number_of_moments() -> None:
    layers, _ = select(discover(tiny_transformer(), [IMAGE]), (), (), 1)
    found = candidates(layers, "readers_and_layers", 2)
    kept = Calibration("input", torch.arange(3), 1, 1).weights_kept
    assert list(passes(found, kept)) == [found]
    one_each = list(passes(found, kept, limit=1))
    assert one_each == [[candidate] for candidate in found]
    limit = 4 * (2 * 16**2 + 32**2 * 2)
    for run in passes(found, kept, limit=limit):
        keys = {layer.input_key: layer.fan_in for candidate in run for layer in candidate.members}
        assert sum(4 * width**2 for width in keys.values()) <= limit or len(run) == 1
    assert [c for run in passes(found, kept, limit=limit) for c in run] == found


def test_macs_count_a_merged_projection_once() -> None:
    members = _candidate().members
    # 12 tokens, rank 5: three readers in each of two layers
    assert factorized_macs(members, 5, merged=False) == 6 * 12 * 5 * (16 + 16)
    assert factorized_macs(members, 5, merged=True) == 12 * 5 * (2 * 16 + 6 * 16)
