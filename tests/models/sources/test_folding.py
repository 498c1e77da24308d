"""Computed weights and parallel branches are folded where that changes no answer, and left alone where it would."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgewright.models.sources.folding import Folds, find_folds, fold
from edgewright.pipeline.analysis.cost import count

warnings.filterwarnings("ignore", message=".*torch.nn.utils.weight_norm")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module) -> nn.Module:
    """Every norm with statistics of its own, as after a training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) / 2
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return model.eval()


class Branches(nn.Module):
    """A convolution beside a 1x1 one and the identity, as RepVGG has it."""

    method = "reparameterize"

    def __init__(self, width: int = 3, wrong: float = 0.0) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.joined: nn.Conv2d | None = None
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None:
            return torch.relu(self.joined(x))
        return torch.relu(self.norm(self.wide(x) + self.narrow(x)) + x)

    def plain(self) -> nn.Conv2d:
        made, norm = nn.Conv2d(3, 3, 3, 1, 1), self.norm
        weight = self.wide.weight + nn.functional.pad(self.narrow.weight, [1] * 4)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        made.weight.data = weight * scale[:, None, None, None]
        made.weight.data[range(3), range(3), 1, 1] += 1.0 + self.wrong
        made.bias.data = (self.wide.bias + self.narrow.bias - norm.running_mean) * scale + norm.bias
        return made


class InPlace(Branches):
    def reparameterize(self, note: str = "") -> None:
        self.joined = self.plain()
        del self.wide, self.narrow, self.norm


class Deployed(Branches):
    def switch_to_deploy(self) -> None:
        self.joined = self.plain()
        del self.wide, self.narrow, self.norm


class Returning(Branches):
    def fuse(self) -> nn.Module:
        return nn.Sequential(self.plain(), nn.ReLU())


class Fails(Branches):
    def fuse(self) -> nn.Module:
        raise RuntimeError("not on Tuesdays")


class OfTwo(Branches):
    def fuse(self, other: nn.Module) -> nn.Module:
        raise AssertionError("never called: it wants an argument")


class ConvNorm(nn.Sequential):
    """A plain pair, as LeViT has it: its batch norm is wanted for training, and an export folds it anyway."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3))

    def fuse(self) -> nn.Module:
        raise_if_used = nn.Conv2d(3, 3, 3, 1, 1)
        scale = self[1].weight / (self[1].running_var + self[1].eps).sqrt()
        raise_if_used.weight.data = self[0].weight * scale[:, None, None, None]
        raise_if_used.bias.data = self[1].bias - self[1].running_mean * scale
        return raise_if_used


def folded(model: nn.Module, x: Tensor = X) -> tuple[nn.Module, Folds]:
    """`model` folded by what stands in JSON, as a checkpoint has it; its answers are held to those of before."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    answer = model(x)
    folds = find_folds(model, (x,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "it works on a copy"
    again = Folds.from_data(json.loads(json.dumps(folds.data())))
    assert again == folds
    model = fold(model, again)
    after = model(x)
    assert torch.allclose(after, answer, atol=1e-4 * float(answer.abs().max()))
    return model, folds


@pytest.mark.parametrize("kind", [InPlace, Deployed, Returning])
def test_branches_are_joined_by_the_networks_own_method(kind: type[Branches]) -> None:
    block = kind()
    model = lively(nn.Sequential(block, kind(), block))  # one of them is called twice
    before = count(model, (X,))
    model, folds = folded(model)
    assert [path for path, _ in folds.joined] == ["1", "0"]
    assert "2 module(s) ('0', '1')" in folds.notes[0] and "folded before any compression" in folds.notes[0]
    after = count(model, (X,))
    assert after.macs == before.macs * 9 // 10 and after.parameters < before.parameters
    assert model[0] is model[2] and all(p.requires_grad for p in model.parameters())
    assert not find_folds(model, (X,)), "there is nothing left to fold"


def test_what_would_change_the_answers_is_left_alone_and_said() -> None:
    model = lively(nn.Sequential(InPlace(), InPlace(wrong=0.1), Fails(), OfTwo()))
    model, folds = folded(model)
    assert folds.joined == (("0", "reparameterize"),)
    assert "'2' keeps its branches: its fuse() failed (RuntimeError: not on Tuesdays)" in folds.notes
    assert any("'1' keeps its branches: after its reparameterize(), its answers differ by" in n for n in folds.notes)
    assert isinstance(model[1].wide, nn.Conv2d)


def test_a_convolution_with_its_norm_stays_a_pair() -> None:
    model = lively(nn.Sequential(ConvNorm(), ConvNorm()))
    model, folds = folded(model)
    assert not folds and not folds.notes and isinstance(model[0][1], nn.BatchNorm2d)


def test_a_model_that_joins_itself() -> None:
    model, folds = folded(lively(Returning()))
    assert folds.joined == (("", "fuse"),) and isinstance(model, nn.Sequential)


NORMS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm, old": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm, old": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("norm", NORMS)
def test_computed_weights_become_plain(norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[norm](nn.Conv2d(3, 4, 3)), nn.Flatten(), NORMS[norm](nn.Linear(144, 5))).eval()
    model, folds = folded(model)
    assert folds.weights == ("0", "2") and "weight norm and the like" in folds.notes[0]
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert type(model[0]) is nn.Conv2d and isinstance(model[2].weight, nn.Parameter)
    with torch.no_grad():
        model[2].weight.zero_()
        assert torch.equal(model(X), model[2].bias.expand(2, 5)), "nothing computes it any more"


def test_a_recurrent_layer_computes_with_its_plain_weights() -> None:
    torch.manual_seed(0)
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0][:, -1]
            return out

    x = torch.randn(2, 5, 3)
    model, folds = folded(Last().eval(), x)
    assert folds.weights == ("lstm",)
    answer = model(x)
    with torch.no_grad():
        model.lstm.weight_hh_l0.zero_()
        assert not torch.equal(model(x), answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "repvit_m0_9", "fastvit_t8", "repghostnet_050"])
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=4))
    x = torch.randn(1, 3, 64, 64)
    before = count(model, (x,))
    model, folds = folded(model, x)
    after = count(model, (x,))
    assert len(folds.joined) > 20 and len(folds.notes) == 1
    assert after.macs <= before.macs and after.parameters < before.parameters
    if name == "mobileone_s0":
        assert after.macs < 0.3 * before.macs and after.parameters < 0.4 * before.parameters


def test_a_model_that_does_not_run_is_for_others_to_refuse(tmp_path: Path) -> None:
    assert not find_folds(InPlace().eval(), (torch.zeros(2, 7),))


def test_linear_layers_of_transformers_that_are_stored_transposed_become_plain_ones() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    whole = transformers.GPT2LMHeadModel(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = whole

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, use_cache=False).logits
            return logits

    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    model = Logits()
    expected = model(ids)
    folds = find_folds(model, [ids])
    assert len(folds.weights) == 8 and "8 module(s)" in folds.notes[0]
    model.model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model = fold(model, Folds.from_data(json.loads(json.dumps(folds.data()))))
    assert torch.allclose(model(ids), expected, atol=1e-5)
    layers = [model.get_submodule(path) for path in folds.weights]
    assert all(type(layer) is nn.Linear for layer in layers)
    assert [layer.weight.requires_grad for layer in layers].count(False) == 1
