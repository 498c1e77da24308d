from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_residual, tiny_task, tiny_transformer
from torch import nn

from edgewright.pipeline.analysis.layers import Layer, discover
from edgewright.pipeline.analysis.second_moments import SecondMoment, collect_second_moments, input_rows
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.task import batches


def collect(model: nn.Module, paths: list[str], size: int = 16, max_rows: int = 10**9) -> dict[str, SecondMoment]:
    split = tiny_task(rows={"calibration": 40}).splits["calibration"]
    graph = discover(model, split.batch([0, 1]).inputs)
    layers: list[Layer] = [layer for layer in graph.layers if layer.path in paths]
    return collect_second_moments(
        model,
        layers,
        batches(split, size),
        len(split),
        max_rows,
        torch.device("cpu"),
        lambda *name: torch.Generator().manual_seed(hash(name) % 2**31),
    )


@settings(deadline=None, max_examples=30)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 0), "same", "valid"]),
    dilation=st.integers(1, 2),
)
def test_rows_times_matrix_is_the_convolution(
    kernel: tuple[int, int], stride: int, padding: object, dilation: int
) -> None:
    if padding == "same":
        stride = 1
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=False)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 9, 8)
    blocks = list(input_rows(conv, x, 1.0, torch.Generator()))
    rows = torch.cat([block for block, _ in blocks])
    expected = conv(x)
    found = (rows @ conv.weight.detach().flatten(1).T).reshape(2, *expected.shape[2:], 5).permute(0, 3, 1, 2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert sum(seen for _, seen in blocks) == len(rows)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (4, 1, "same", 1), (5, 2, 2, 2)])
def test_rows_of_a_one_dimensional_convolution(kernel: int, stride: int, padding: int | str, dilation: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(3, 5, kernel, stride, padding, dilation, bias=False)
    x = torch.randn(2, 3, 14)
    rows = torch.cat([block for block, _ in input_rows(conv, x, 1.0, torch.Generator())])
    expected = conv(x)
    found = (rows @ conv.weight.detach().flatten(1).T).reshape(2, expected.shape[2], 5).permute(0, 2, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_moment_is_the_mean_over_all_batches() -> None:
    model = tiny_transformer()
    found = collect(model, ["embed"], size=16)["embed"]
    x = tiny_task(rows={"calibration": 40}).splits["calibration"].batch(range(40)).inputs[0].reshape(-1, 12).double()
    assert (found.rows, found.seen) == (480, 480)
    assert torch.allclose(found.matrix.double(), x.T @ x / 480, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.matrix, collect(model, ["embed"], size=7)["embed"].matrix, rtol=1e-4, atol=1e-6)


def test_cap_takes_a_recorded_share_of_tokens_and_positions() -> None:
    for model, path, seen in ((tiny_transformer(), "layers.1.up", 480), (tiny_residual(), "blocks.0.conv1", 5760)):
        whole = collect(model, [path])[path]
        some = collect(model, [path], max_rows=240)[path]
        assert whole.seen == some.seen == seen
        assert 200 <= some.rows <= 280
        assert 0.5 < float(some.matrix.trace() / whole.matrix.trace()) < 2.0
        assert torch.equal(some.matrix, collect(model, [path], max_rows=240)[path].matrix), "seeded"


def test_hooks_are_gone_afterwards_also_after_a_failure() -> None:
    model = tiny_transformer()
    nn.init.constant_(model.layers[1].norm2.weight, float("nan"))  # type: ignore[index,union-attr]
    with pytest.raises(StageError, match=r"'layers\.1\.up' is not finite.*calibration batch 1"):
        collect(model, ["layers.0.up", "layers.1.up"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_too_large_for_float32_squares_are_named() -> None:
    model = tiny_transformer()
    nn.init.constant_(model.layers[0].norm2.bias, 1e25)  # type: ignore[index,union-attr]
    with pytest.raises(StageError, match=r"'layers\.0\.up'.*too large"):
        collect(model, ["layers.0.up"])
