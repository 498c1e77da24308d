"""Training after a factorization: factors or adapters, resumable, nothing else touched."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import Dying
from tiny import tiny_residual, tiny_signal, tiny_task, tiny_transformer
from torch import Tensor, nn
from unlabelled import TwoAnswers, TwoHeads

from edgewright.pipeline.errors import StageError
from edgewright.pipeline.stage import StageResult
from edgewright.pipeline.stages.basis_sharing.recovery import RecoveryConfig, recover
from edgewright.pipeline.stages.basis_sharing.stage import BasisSharingConfig, check, fit
from edgewright.pipeline.store.context import FolderContext

TASK = tiny_task(rows={"train": 24, "calibration": 24})
MODELS = {"transformer": tiny_transformer, "residual": tiny_residual, "signal": tiny_signal}
SHORT = {"steps": 10, "batch_size": 24, "save_every": 4, "learning_rate": 1e-3, "distillation": 1.0}


def run(model: nn.Module, context: FolderContext, **recovery: Any) -> StageResult:
    settings = {"ratio": 0.8, "groups": "readers", "share": "always", "min_width": 4}
    return fit(copy.deepcopy(model), TASK, BasisSharingConfig(**settings, recovery=recovery or None), context)


@torch.no_grad()
def error(result: StageResult, model: nn.Module) -> Tensor:
    inputs = TASK.splits["train"].batch(range(24)).inputs[0]
    return (result.model(inputs).log_softmax(dim=-1) - model(inputs).log_softmax(dim=-1)).norm()


@pytest.mark.parametrize("method", ["factors", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_it_comes_nearer_to_the_dense_model_and_goes_on_where_it_was_killed(
    name: str, method: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    before = run(model, FolderContext(tmp_path / "none"))
    options = {**SHORT, "method": method, "lora_rank": 2}
    whole = run(model, FolderContext(tmp_path / "whole"), **options)
    assert error(whole, model) < 0.95 * error(before, model)
    with pytest.raises(KeyboardInterrupt):
        run(model, Dying(tmp_path / "cut", 2), **options)
    resumed = run(model, FolderContext(tmp_path / "cut"), **options)
    states = [result.model.state_dict() for result in (before, whole, resumed)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    changed = set()
    for key, value in states[1].items():
        assert torch.equal(value, states[2][key]), key
        if not torch.equal(value, states[0][key]):
            changed.add(key.rpartition(".")[2] if "coefficients" in key else "basis")
            assert ".basis." in key or key.endswith("coefficients")
    assert changed == ({"coefficients", "basis"} if method == "factors" else {"coefficients"})
    assert [row["steps"] for row in whole.metrics["recovery"]] == [4, 8, 10]
    assert all(p.requires_grad and p.grad is None for p in whole.model.parameters())


@pytest.mark.parametrize(("method", "package"), [("factors", "accelerate"), ("lora", "peft")])
def test_a_missing_package_is_named_before_any_compute(
    method: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = BasisSharingConfig(recovery=RecoveryConfig(method=method))  # type: ignore[arg-type]
    check(tiny_transformer(), TASK, config)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StageError, match=f"needs the package {package}: pip install"):
        check(tiny_transformer(), TASK, config)
    with pytest.raises(StageError, match=f"needs the package {package}: pip install"):
        run(tiny_transformer(), FolderContext(tmp_path), method=method)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model, context = tiny_transformer(), FolderContext(tmp_path)
    with pytest.raises(StageError, match="needs the dense model"):
        recover(model, None, TASK, RecoveryConfig(), context)
    for method in ("factors", "lora"):
        with pytest.raises(StageError, match="no factorized layer to train"):
            recover(model, None, TASK, RecoveryConfig(distillation=0.0, method=method), context)
    with pytest.raises(StageError, match=r"diverged in step 1.*try 1e"):
        broken = copy.deepcopy(model)
        nn.init.constant_(broken.get_submodule("fc").get_parameter("bias"), float("nan"))
        recover(broken, None, TASK, RecoveryConfig(distillation=0.0), context, parameters=list(broken.parameters()))


def test_a_model_of_several_answers_is_drawn_to_all_of_the_dense_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task: Any = TwoAnswers()
    body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24))
    model = TwoHeads()
    model.body = body  # type: ignore[assignment]
    with torch.no_grad():
        model.a.weight *= 20.0  # classes that are far apart, as of a trained network
    model.eval()
    inputs = task.splits["train"].batch(range(15)).inputs[0]

    def shared(folder: str, **recovery: Any) -> tuple[Tensor, Tensor]:
        config = BasisSharingConfig(
            ratio=0.7, min_width=6, calibration_samples=None, recovery={**SHORT, **recovery} if recovery else None
        )
        found = fit(copy.deepcopy(model), task, config, FolderContext(tmp_path / folder)).model
        with torch.no_grad():
            kind, size = found(inputs)
        return kind.log_softmax(dim=1), size

    with torch.no_grad():
        wanted = model(inputs)
    wanted = (wanted[0].log_softmax(dim=1), wanted[1])
    before, after = shared("none"), shared("some", steps=120, learning_rate=3e-3)
    for was, now, want in zip(before, after, wanted, strict=True):
        assert (now - want).norm() < 0.85 * (was - want).norm()
