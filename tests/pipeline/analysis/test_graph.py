from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TinyResidual, tiny_residual, tiny_transformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from edgewright.pipeline.analysis.layers import ModelGraph, discover, role_of
from edgewright.pipeline.errors import StageError

IMAGE = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def paths_of_readers(graph: ModelGraph) -> list[list[str]]:
    return [[layer.path for layer in group] for group in graph.readers() if len(group) > 1]


def reasons(graph: ModelGraph) -> dict[str, str]:
    return {skipped.path: skipped.reason for skipped in graph.skipped}


class Plain(nn.Module):
    """Whatever a test puts into it, called by a function of the test."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def test_attention_reads_one_tensor_and_roles_run_through_the_layers() -> None:
    graph = discover(tiny_transformer(), [IMAGE])
    assert paths_of_readers(graph) == [[f"layers.{i}.attention.{name}" for name in "qkv"] for i in range(3)]
    roles = {role: [layer.path for layer in group] for role, group in graph.roles().items()}
    assert roles["layers.*.up|linear1x1|16"] == [f"layers.{i}.up" for i in range(3)]
    assert roles["layers.*.attention.q|linear1x1|16"] == [f"layers.{i}.attention.q" for i in range(3)]
    assert graph.skipped == ()
    assert [layer.path for layer in graph.layers if layer.logits] == ["fc"]
    assert not any(layer.stem for layer in graph.layers)


def test_residual_blocks_have_first_convolutions_of_one_role() -> None:
    graph = discover(tiny_residual(), [IMAGE])
    roles = {role: [layer.path for layer in group] for role, group in graph.roles().items()}
    assert roles["blocks.*.conv1|conv2d3x3|8"] == [f"blocks.{i}.conv1" for i in range(3)]
    assert roles["blocks.*.conv2|conv2d3x3|16"] == [f"blocks.{i}.conv2" for i in range(3)]
    assert [layer.path for layer in graph.layers if layer.stem] == ["stem.0"]
    assert [layer.order for layer in graph.layers] == list(range(8))


def test_shapes_rows_and_macs() -> None:
    layers = {layer.path: layer for layer in discover(tiny_residual(), [IMAGE]).layers}
    strided = layers["blocks.1.conv1"]
    assert (strided.kind, strided.input_width, strided.output_width, strided.kernel) == ("conv2d", 8, 16, (3, 3))
    assert (strided.fan_in, strided.rows, strided.output_shape) == (72, 36, (2, 16, 6, 6))
    assert strided.macs == 36 * 72 * 16
    assert layers["fc"].macs == 8 * 4
    up = next(x for x in discover(tiny_transformer(), [IMAGE]).layers if x.path == "layers.0.up")
    assert (up.rows, up.fan_in, up.macs) == (12, 16, 12 * 16 * 32)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("layers.3.attention.q", "layers.*.attention.q|linear1x1|7"),
        ("encoder.layers.encoder_layer_11.mlp.0", "encoder.layers.encoder_layer_*.mlp.*|linear1x1|7"),
        ("layer2.0.conv1", "layer*.*.conv1|linear1x1|7"),
        ("fc2", "fc*|linear1x1|7"),
        ("head", "head|linear1x1|7"),
    ],
)
def test_roles(path: str, role: str) -> None:
    assert role_of(path, "linear", (1, 1), 7) == role


def test_model_is_left_as_it_was() -> None:
    model = tiny_residual().train()
    model.blocks[1].eval()  # type: ignore[index]
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    discover(model, [IMAGE])
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_addresses_used_again_do_not_make_readers() -> None:
    # every intermediate is freed at once in eager mode: without references kept, ids and addresses repeat
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    graph = discover(model, [torch.randn(4, 8)])
    assert len({layer.source for layer in graph.layers}) == 20


def test_views_of_the_same_rows_are_one_read_and_in_place_changes_are_not() -> None:
    def views(m: Plain, x: Tensor) -> Tensor:
        out: Tensor = m.a(x) + m.b(x.view(-1, 8)).view(2, 3, 8) + m.c(x[:, 1:2]).sum(dim=1, keepdim=True)
        return out

    def in_place(m: Plain, x: Tensor) -> Tensor:
        x = x * 2
        y = m.a(x)
        x.relu_()
        out: Tensor = y + m.b(x)
        return out

    names = {name: nn.Linear(8, 8) for name in "abc"}
    assert paths_of_readers(discover(Plain(views, **names), [torch.randn(2, 3, 8)])) == [["a", "b"]]
    assert paths_of_readers(discover(Plain(in_place, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), [torch.randn(2, 8)])) == []


def test_keyword_inputs_are_seen() -> None:
    model = Plain(lambda m, x: m.a(input=x) + m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    assert paths_of_readers(discover(model, [torch.randn(2, 8)])) == [["a", "b"]]


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _tied() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, second, nn.Linear(8, 8))


def _twice() -> nn.Module:
    shared = nn.Linear(8, 8)
    return Plain(lambda m, x: m.a(m.b(m.a(x))), a=shared, b=nn.Linear(8, 8))


def _two_paths() -> nn.Module:
    shared = nn.Linear(8, 8)
    return Plain(lambda m, x: m.b(m.c(x)), a=shared, b=shared, c=nn.Linear(8, 8))


def _hidden_reference() -> nn.Module:
    model = Plain(lambda m, x: m.b(m.hidden[0](x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model.hidden = [model.a]  # type: ignore[assignment]
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda _m, _i, out: out + 1)
    return model


@pytest.mark.parametrize(
    ("model", "path", "reason"),
    [
        (_tied(), "0", "shares a parameter with '1'"),
        (_tied(), "1", "shares a parameter with '0'"),
        (_hidden_reference(), "a", "does not call it at this path"),
        (_hooked(), "0", "hooks are attached"),
        (nn.Sequential(OwnForward(8, 8), nn.Linear(8, 8)), "0", "OwnForward has a forward of its own"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)), "0", "parametrized"),
        (
            Plain(lambda m, x: m.b(m.a(x).to(m.a.weight.dtype)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
            "a",
            "reads its 'weight' directly",
        ),
    ],
)
def test_layers_that_cannot_be_replaced_are_reported(model: nn.Module, path: str, reason: str) -> None:
    graph = discover(model, [torch.randn(2, 8)])
    assert reason in reasons(graph)[path]
    assert path not in [layer.path for layer in graph.layers]
    assert graph.layers, "the others remain"


def test_layers_that_run_several_times_or_stand_at_several_paths() -> None:
    graph = discover(_twice(), [torch.randn(2, 8)])
    assert [(x.path, x.calls, x.rows, x.macs) for x in graph.layers] == [("a", 2, 2, 128), ("b", 1, 1, 64)]
    assert graph.layers[0].logits and not graph.skipped
    model = _two_paths()
    graph = discover(model, [torch.randn(2, 8)])
    assert [(x.path, x.order) for x in graph.layers] == [("c", 0), ("a", 1)]
    assert model.a is model.b and isinstance(model.a, nn.Linear)

    def siamese(m: Plain, x: Tensor) -> Tensor:
        left, right = (m.q(y) * m.k(y) for y in (x, x + 1))
        out: Tensor = m.end(left - right)
        return out

    layers = {name: nn.Linear(8, 8) for name in ("q", "k", "end")}
    assert paths_of_readers(discover(Plain(siamese, **layers), [torch.randn(2, 8)])) == [["q", "k"]]


def test_convolutions_that_cannot_be_replaced_are_reported() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    )
    found = reasons(discover(model, [IMAGE]))
    assert found == {"1": "a grouped convolution (8 groups)", "2": "pads with 'reflect'"}


def test_fused_encoder_layers_of_pytorch_are_seen_through() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)).eval()
    graph = discover(model, [torch.randn(2, 5, 8)])
    paths = [x.path for x in graph.layers]
    assert paths == ["0", *(f"1.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)), "2"]
    assert set(reasons(graph)) == {f"1.layers.{i}.self_attn.out_proj" for i in range(2)}


def test_logits_layer_is_found_behind_other_operations() -> None:
    class Probabilities(TinyResidual):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log_softmax(super().forward(x), dim=1)

    assert [x.path for x in discover(Probabilities(), [IMAGE]).layers if x.logits] == ["fc"]
    early = Plain(lambda m, x: (m.head(x), m.aux(x) * 0)[0], head=nn.Linear(8, 4), aux=nn.Linear(8, 4))
    assert [x.path for x in discover(early, [torch.randn(2, 8)]).layers if x.logits] == ["head"]


def test_failing_forward_says_what_happened_and_restores_the_model() -> None:
    model = tiny_residual()
    before = list(model.modules())
    with pytest.raises(StageError, match=r"shapes \[\(2, 3, 12, 12\)\].*RuntimeError"):
        discover(model, [torch.randn(2, 3, 12, 12)])
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_the_layer_before_a_tied_head_does_not_give_the_logits() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.fc(self.embedding(x)))
            return logits

    model = Tied().eval()
    graph = discover(model, [torch.tensor([[1, 2], [3, 4]])])
    assert [(layer.path, layer.logits) for layer in graph.layers] == [("fc", False)]
    assert [s.path for s in graph.skipped] == ["head"] and not model.head._forward_hooks
