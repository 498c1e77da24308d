"""Heads on hooks: what they read, in which shapes, and that the base is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CLASSES, tiny_residual, tiny_transformer
from torch import Tensor, nn

from edgewright.models.layers.multi_exit import ExitPool, HeadSpec, MultiExit

NETWORKS = {
    "residual": (tiny_residual, [HeadSpec("stem", 8), HeadSpec("blocks.1", 8, pool=2)], [4, 4]),
    "transformer": (tiny_transformer, [HeadSpec("layers.0", 16), HeadSpec("layers.1.norm1", 16)], [3, 3]),
}


class InPlace(nn.Module):
    """Changes the outputs of its modules in place, as torchvision's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.hidden = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += 1.0
        hidden = self.hidden(self.relu(y).mean(dim=(2, 3)))
        logits: Tensor = self.fc(self.relu(hidden))
        return logits


@pytest.mark.parametrize("policy", ["class_exclusion", "max_probability"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_that_never_exits_is_its_base(name: str, policy: str) -> None:
    build, specs, dims = NETWORKS[name]
    base, x = build(), torch.randn(9, 1, 12, 12)
    model = MultiExit(copy.deepcopy(base), specs, dims, CLASSES, policy).eval()
    logits = model.all_logits(x)
    assert [tuple(z.shape) for z in logits] == [(9, CLASSES)] * 3
    assert torch.equal(logits[-1], base(x))
    output = model(x)
    assert torch.equal(output.label, base(x).argmax(dim=1)) and (output.exit_index == 2).all()
    names = [f"heads.{i}.linear.{p}" for i in range(2) for p in ("weight", "bias")]
    assert set(model.state_dict()) == {f"base.{k}" for k in base.state_dict()} | set(names) | {"thresholds"}
    assert not any(m._forward_hooks for m in model.modules()), "hooks live for one pass only"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_empty_batches_and_single_rows(name: str) -> None:
    build, specs, dims = NETWORKS[name]
    model = MultiExit(build(), specs, dims, CLASSES, "class_exclusion").eval()
    model.thresholds.fill_(0.9)
    assert model(torch.randn(1, 1, 12, 12)).scores.shape == (1, CLASSES)
    assert model.decide([torch.zeros(0, CLASSES)] * 3).label.shape == (0,)


def test_heads_read_what_a_module_returned_not_what_became_of_it() -> None:
    torch.manual_seed(0)
    base = InPlace()
    model = MultiExit(base, [HeadSpec("conv", 4), HeadSpec("hidden", 4)], [4, 2], 3, "class_exclusion")
    x = torch.randn(5, 1, 6, 6)
    features, _ = model.pooled(x)
    conv = base.conv(x)
    assert torch.equal(features[0], conv.mean(dim=(2, 3)))
    assert torch.equal(features[1], base.hidden(torch.relu(conv + 1.0).mean(dim=(2, 3))))
    assert (features[1] < 0).any(), "not after the ReLU that follows"
    sum(z.sum() for z in model.all_logits(x)).backward()
    assert model.head(1).linear.weight.grad is not None


@pytest.mark.parametrize(
    ("shape", "spec", "dims", "expected"),
    [
        ((2, 3, 4, 6), HeadSpec("", 3), 4, lambda x: x.mean(dim=(2, 3))),
        ((2, 4, 6, 3), HeadSpec("", 3, axis=3), 4, lambda x: x.mean(dim=(1, 2))),
        ((2, 5, 3), HeadSpec("", 3), 3, lambda x: x.mean(dim=1)),
        ((2, 3, 5), HeadSpec("", 3, axis=1), 3, lambda x: x.mean(dim=2)),
        ((2, 3), HeadSpec("", 3), 2, lambda x: x),
        ((2, 5, 3), HeadSpec("", 3, token=0), 3, lambda x: x[:, 0]),
        ((2, 3, 4, 6), HeadSpec("", 3, pool=2), 4, lambda x: x.view(2, 3, 2, 2, 2, 3).mean(dim=(3, 5)).flatten(1)),
        (
            (2, 4, 6, 3),
            HeadSpec("", 3, pool=2, axis=3),
            4,
            lambda x: x.permute(0, 3, 1, 2).reshape(2, 3, 2, 2, 2, 3).mean(dim=(3, 5)).flatten(1),
        ),
    ],
)
def test_pooling_keeps_the_feature_axis(shape, spec, dims, expected) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(ExitPool(spec, dims)(x), expected(x))


def test_modules_that_do_not_run_once_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.unused, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.twice(self.twice(x)))
            return logits

    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=r"'twice' runs more than once"):
        MultiExit(Odd(), [HeadSpec("twice", 4)], [2], 3, "class_exclusion")(x)
    model = MultiExit(Odd(), [HeadSpec("unused", 4)], [2], 3, "class_exclusion")
    with pytest.raises(RuntimeError, match=r"'unused' did not run"):
        model(x)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"no module 'nowhere'"):
        MultiExit(Odd(), [HeadSpec("nowhere", 4)], [2], 3, "class_exclusion")


def test_several_inputs_are_passed_on_in_order() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.a(x) - self.b(y))
            return logits

    base = Two().eval()
    model = MultiExit(base, [HeadSpec("a", 5)], [2], 2, "max_probability").eval()
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    assert torch.equal(model(x, y).label, base(x, y).argmax(dim=1))


def test_a_masked_mean_reads_the_tokens_that_count() -> None:
    x = torch.randn(3, 5, 2)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    pooled = ExitPool(HeadSpec("", 2, mask=1), 3)(x, mask)
    torch.testing.assert_close(pooled[0], x[0, :2].mean(dim=0))
    torch.testing.assert_close(pooled[1], x[1].mean(dim=0))
    assert pooled[2].tolist() == [0.0, 0.0], "a row without a token has zeros, not NaN"
    for wrong in (HeadSpec("here", 2, mask=0), HeadSpec("here", 2, token=0)):
        with pytest.raises(ValueError, match="'here' is no sequence of tokens"):
            ExitPool(wrong, 4)


def test_heads_may_have_a_hidden_layer_and_read_another_input_as_mask() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.layer(self.embed(ids)) * mask[:, :, None]
            logits: Tensor = self.fc(x.sum(dim=1))
            return logits

    torch.manual_seed(0)
    base = Words()
    specs = [HeadSpec("embed", 4, mask=1, hidden=6), HeadSpec("layer", 4, token=0)]
    model = MultiExit(base, specs, [3, 3], 3, "max_probability").eval()
    ids, mask = torch.randint(9, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    first, second, _ = model.all_logits(ids, mask)
    padded = ids * mask  # what padding holds does not matter
    assert torch.equal(model.all_logits(padded, mask)[0], first)
    head = model.head(0)
    pooled = torch.stack([base.embed(ids[0, :3]).mean(dim=0), base.embed(ids[1, :1]).mean(dim=0)])
    torch.testing.assert_close(first, head.linear(torch.relu(head.hidden(pooled))))
    torch.testing.assert_close(second, model.head(1).linear(base.layer(base.embed(ids[:, 0]))))
    assert (head.macs, model.head(1).macs) == (4 * 6 + 6 * 3, 4 * 3)
    assert {"heads.0.hidden.weight", "heads.0.linear.bias"} <= set(model.state_dict())
