"""MACs, parameters and bytes against hand counts, and the places where an exit may sit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny import TinyResidual, TinyTransformer, tiny_residual
from torch import Tensor, nn

from edgewright.models.layers.factorized import FactorizedConv2d, FactorizedLinear, SharedBasis
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.analysis.cost import count, cuts, unique_parameters, unique_weight_bytes
from edgewright.pipeline.errors import ModelError

WIDTH, LAYERS, TOKENS, HIDDEN = 16, 3, 12, 32


def test_a_residual_network_by_hand() -> None:
    model = TinyResidual(width=8, inner=16)
    cost = count(model, (torch.randn(5, 1, 12, 12),))
    stem = 9 * 8 * 144
    full, strided, small = 2 * 9 * 8 * 16 * 144, 2 * 9 * 8 * 16 * 36, 2 * 9 * 8 * 16 * 36
    assert cost.macs == stem + full + strided + small + 8 * 4
    assert cost.attention_macs == 0
    assert cost.per_module["blocks"].macs == full + strided + small
    assert cost.per_module["blocks.0.conv1"].macs == full // 2
    assert cost.per_module["blocks.0.bn1"].macs == 0
    assert cost.per_module["fc"].macs == 32 and cost.per_module["fc"].parameters == 36
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.unique_weight_bytes == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )


def test_attention_has_a_column_of_its_own() -> None:
    cost = count(TinyTransformer(WIDTH, LAYERS), (torch.randn(2, 1, 12, 12),))
    layer = TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    assert cost.macs == TOKENS * 12 * WIDTH + LAYERS * layer + WIDTH * 4
    assert cost.attention_macs == LAYERS * 2 * TOKENS * TOKENS * WIDTH
    one = cost.per_module["layers.1.attention"]
    assert (one.macs, one.attention_macs) == (TOKENS * 4 * WIDTH**2, 2 * TOKENS * TOKENS * WIDTH)
    assert cost.per_module["layers.1.attention.q"].macs == TOKENS * WIDTH**2
    assert cost.per_module["layers"].calls == 0 and cost.per_module["layers.0"].calls == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_torchs_own_attention_is_not_hidden_by_its_fast_path(frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(not frozen)
    cost = count(model, (torch.randn(1, 7, 16),))
    assert cost.macs == 2 * 7 * (4 * 16 * 16 + 2 * 16 * 32)
    assert cost.attention_macs == 2 * 2 * 7 * 7 * 16
    assert torch.backends.mha.get_fastpath_enabled()


class Factorized(nn.Module):
    """Two linear layers and two convolutions, each pair with one basis."""

    def __init__(self) -> None:
        super().__init__()
        bank = SharedBasis(torch.randn(5, 3, 3, 3))
        self.convs = nn.Sequential(
            FactorizedConv2d(bank, torch.randn(3, 5, 1, 1), None, (1, 1), (1, 1), (1, 1)),
            FactorizedConv2d(bank, torch.randn(4, 5, 1, 1), torch.randn(4), (2, 2), (1, 1), (1, 1)),
        )
        basis = SharedBasis(torch.randn(4, 2))
        self.a = FactorizedLinear(basis, torch.randn(2, 4), torch.randn(4))
        self.b = FactorizedLinear(basis, torch.randn(2, 6), None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x).mean(dim=(2, 3))
        out: Tensor = self.b(self.a(y))
        return out


def test_shared_bases_count_once_in_bytes_and_twice_in_macs() -> None:
    cost = count(Factorized(), (torch.randn(1, 3, 8, 8),))
    convs = (5 * 27 + 3 * 5) * 64 + (5 * 27 + 4 * 5) * 16
    assert cost.macs == convs + (4 * 2 + 2 * 4) + (4 * 2 + 2 * 6)
    assert cost.parameters == 5 * 27 + 3 * 5 + 4 * 5 + 4 + 4 * 2 + 2 * 4 + 4 + 2 * 6
    assert cost.unique_weight_bytes == 4 * cost.parameters
    assert cost.per_module["a"].parameters == 8 + 8 + 4
    assert cost.per_module["b"].parameters == 8 + 12


def test_weights_that_are_views_of_one_storage_count_once() -> None:
    whole = torch.randn(6, 4)
    model = nn.Module()
    model.register_parameter("top", nn.Parameter(whole[:3]))
    model.register_parameter("overlap", nn.Parameter(whole[2:5]))
    model.register_parameter("turned", nn.Parameter(whole.T))
    model.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    assert unique_parameters(model) == 24
    assert unique_weight_bytes(model) == 24 * 4 + 8
    del model.turned
    assert unique_parameters(model) == 20


class Plain(nn.Module):
    """Wraps a function of the input and one weight [4, 6]."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.weight, *inputs)


def filled(w: Tensor, x: Tensor) -> Tensor:
    buffer = torch.zeros(1, 6, 6)
    buffer[:, :, 1:3] = (x @ w).transpose(1, 2)
    return buffer @ buffer


@pytest.mark.parametrize(
    ("function", "macs", "attention"),
    [
        (lambda w, x: x @ w, 2 * 4 * 6, 0),
        (lambda w, x: torch.einsum("ntd,do->nto", x, w), 2 * 4 * 6, 0),
        (lambda w, x: torch.einsum("ntd,nsd->nts", x, x), 0, 2 * 2 * 4),
        (lambda w, x: x[:, 0] @ w[:, 0], 4, 0),
        # a weight expanded over the batch is still a weight, and so is one that is computed from weights
        (lambda w, x: torch.bmm(x, w.expand(len(x), -1, -1)), 2 * 4 * 6, 0),
        (lambda w, x: x @ (w @ w.T), 2 * 4 * 4, 0),
        (lambda w, x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2)), 0, 2 * 2 * 2 * 4),
        # what the input reaches through a slice of a buffer
        (filled, 2 * 4 * 6, 6 * 6 * 6),
        (lambda w, x: x.relu() + x.sum(), 0, 0),
    ],
)
def test_which_factor_is_a_weight(function: Any, macs: int, attention: int) -> None:
    cost = count(Plain(function), (torch.randn(3, 2, 4),))
    assert (cost.macs, cost.attention_macs) == (macs, attention)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5), 2 * 6 * 9 * 25),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), 4 * 9 * 9),
        (nn.ConvTranspose2d(4, 6, 2, 2), (4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Conv1d(4, 6, 3), (4, 10), 4 * 6 * 3 * 8),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 2 * 3 * 8 * 27),
        (nn.LSTM(4, 5, batch_first=True), (7, 4), 7 * 4 * (4 * 5 + 5 * 5)),
        # the first step multiplies the zero state, which no input reaches
        (nn.GRU(4, 5, batch_first=True), (7, 4), 7 * 3 * 4 * 5 + 6 * 3 * 5 * 5),
    ],
)
def test_layers_by_hand(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count(model, (torch.randn(2, *shape),)).macs == macs


def test_a_module_that_runs_twice_costs_twice() -> None:
    layer = nn.Linear(4, 4)
    cost = count(nn.Sequential(layer, nn.ReLU(), layer), (torch.randn(1, 4),))
    assert cost.macs == 32 and cost.parameters == 20
    assert cost.per_module["0"].macs == 32 and cost.per_module["0"].calls == 2


def test_exits_are_part_of_the_cost() -> None:
    base = tiny_residual()
    plain = count(base, (torch.randn(1, 1, 12, 12),))
    model = MultiExit(base, [HeadSpec("blocks.0", 8)], [4], 4, "class_exclusion")
    cost = count(model, (torch.randn(1, 1, 12, 12),))
    assert cost.macs == plain.macs + 8 * 4
    assert cost.per_module["base"].macs == plain.macs
    assert cost.per_module["heads.0.linear"].macs == 32


class Counting(nn.Module):
    """Breaks rules on purpose: a buffer that changes in eval mode, and dropout that always draws."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.fc = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.seen += 1
        out: Tensor = self.norm(self.fc(x)) + torch.rand(())
        return out


def test_counting_leaves_no_trace() -> None:
    model = Counting().train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    random = torch.rand(3)
    torch.manual_seed(5)
    count(model, (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),))
    cuts(model, (torch.zeros(3, 4),))
    assert torch.equal(torch.rand(3), random)
    assert model.training and model.fc.training and not model.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_does_not_run_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).train()
    with pytest.raises(ModelError, match=r"Sequential does not run on inputs of shape \[1, 4\]: RuntimeError"):
        count(model, (torch.randn(2, 4),))
    assert model.training and not model[0]._forward_hooks


class Awkward(nn.Module):
    """What strangers bring: positions without a batch, in-place activations, tuples, modules that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), act=nn.ReLU(inplace=True), no=nn.Identity()))
        self.drop = nn.Dropout()
        self.flat = nn.Flatten(2)
        self.positions = nn.Embedding(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.never = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.last = nn.Sequential(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(self.drop(self.first(x))).transpose(1, 2)
        x = x + self.positions(torch.arange(4)[None])
        x, _ = self.lstm(x)
        x = self.twice(self.twice(x)).mean(dim=1)
        out: Tensor = self.last(x)
        return out


def test_cuts_list_the_places_where_an_exit_may_sit() -> None:
    found = cuts(Awkward(), (torch.randn(4, 1, 4, 4),))
    conv, lstm, twice, last = 4 * 9 * 4, 4 * 4 * (4 * 4 + 4 * 4), 4 * 16, 8
    total = conv + lstm + 2 * twice + last
    assert [(c.path, c.type, c.shape, c.macs_so_far) for c in found] == [
        ("first", "Sequential", (1, 4, 2, 2), conv),
        ("flat", "Flatten", (1, 4, 4), conv),
    ]
    assert found[0].share == conv / total


def test_cuts_of_a_transformer_carry_attention() -> None:
    model = TinyTransformer(WIDTH, LAYERS)
    found = {cut.path: cut for cut in cuts(model, (torch.randn(1, 1, 12, 12),))}
    assert [path for path in found if path.count(".") == 1] == [f"layers.{i}" for i in range(LAYERS)]
    layer = TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    assert found["layers.1"].macs_so_far == TOKENS * 12 * WIDTH + 2 * layer
    assert found["layers.1"].attention_macs_so_far == 2 * 2 * TOKENS * TOKENS * WIDTH
    assert "fc" not in found and "layers" not in found


def test_every_cut_takes_a_head() -> None:
    model, x = tiny_residual(), torch.randn(3, 1, 12, 12)
    places = cuts(model, (x,))
    assert [c.macs_so_far for c in places] == sorted(c.macs_so_far for c in places)
    specs = [HeadSpec(cut.path, cut.shape[1]) for cut in places]
    logits = MultiExit(model, specs, [len(c.shape) for c in places], 4, "max_probability").all_logits(x)
    assert len(logits) == len(places) + 1 and all(each.shape == (3, 4) for each in logits)
