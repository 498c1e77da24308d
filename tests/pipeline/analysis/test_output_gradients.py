"""Gradients at outputs, against autograd sample by sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_residual, tiny_task, tiny_transformer
from torch import nn

from edgewright.pipeline.analysis.layers import Layer, discover
from edgewright.pipeline.analysis.output_gradients import Gradients, collect_gradients, drawn_targets, is_pulled_back
from edgewright.pipeline.errors import StageError
from edgewright.pipeline.metric import IGNORED
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import batches

TASK = tiny_task(rows={"calibration": 12})


def layers_of(model: nn.Module) -> list[Layer]:
    return list(discover(model, TASK.splits["calibration"].batch([0, 1]).inputs).layers)


def collected(model: nn.Module, size: int = 4, **options: object) -> Gradients:
    return collect_gradients(
        model,
        TASK,
        layers_of(model),
        batches(TASK.splits["calibration"], size),
        torch.device("cpu"),
        generator=FolderContext(Path()).generator,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("model", [tiny_transformer(), tiny_residual()], ids=["linear", "convolution"])
def test_moments_and_weight_fisher_are_autograds(model: nn.Module) -> None:
    moments, fisher = collected(model), collected(model, size=1, of_weights=True)
    kinds = set()
    for layer in layers_of(model)[:7]:
        module = model.get_submodule(layer.path)
        weight = module.get_parameter("weight")
        expected = torch.zeros(layer.output_width, layer.output_width)
        squares = torch.zeros(layer.fan_in)
        for i in range(12):
            batch, outputs = TASK.splits["calibration"].batch([i]), []
            handle = module.register_forward_hook(lambda _m, _x, y, kept=outputs: kept.append(y))
            loss = TASK.loss(model(*batch.inputs), batch.targets)
            handle.remove()
            of_output, of_weight = torch.autograd.grad(loss, [outputs[0], weight])
            rows = (of_output if layer.kind == "linear" else of_output.movedim(1, -1)).reshape(-1, layer.output_width)
            expected += rows.T @ rows / 12
            squares += of_weight.flatten(1).square().sum(dim=0) / 12
        kinds.add(is_pulled_back(layer))
        if is_pulled_back(layer):
            expected, found = (weight.T @ expected @ weight).detach(), moments.pulled_back[layer.path]
        else:
            found = moments.outputs[layer.path]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        assert torch.allclose(fisher.weights[layer.path], squares, rtol=1e-3)
    assert kinds == ({False, True} if moments.pulled_back else {False})


def test_the_batch_size_does_not_matter_and_the_model_stays_as_it_was() -> None:
    model = tiny_transformer()
    model.get_submodule("embed").requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    one, all_at_once = collected(model, size=1), collected(model, size=12)
    for kind in ("outputs", "pulled_back"):
        few, many = getattr(one, kind), getattr(all_at_once, kind)
        assert few.keys() == many.keys() and few
        assert all(torch.allclose(few[path], many[path], rtol=1e-3, atol=1e-8) for path in few)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_not_finite_names_the_layer() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.get_submodule("fc").get_parameter("bias")[0] = float("nan")
    with pytest.raises(StageError, match="the gradient of the loss at layer 'fc' is not finite"):
        collected(model)


def test_targets_are_drawn_from_the_prediction() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7])).expand(2, 4000, 3)
    targets = torch.zeros(2, 4000, dtype=torch.int64)
    targets[:, -1] = IGNORED
    drawn = drawn_targets(logits, targets, torch.Generator().manual_seed(0))
    assert (drawn[:, -1] == IGNORED).all()
    shares = torch.bincount(drawn[:, :-1].flatten(), minlength=3) / (2 * 3999)
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.03)
    sampled, of_data = (collected(tiny_transformer(), labels=x).outputs["fc"] for x in ("sampled", "data"))
    assert not torch.allclose(sampled, of_data)
