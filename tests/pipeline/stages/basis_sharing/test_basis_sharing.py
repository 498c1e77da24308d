from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import Dying
from tiny import Block, TinyResidual, tiny_residual, tiny_siamese, tiny_signal, tiny_task, tiny_transformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from edgewright.models.layers.factorized import FactorizedConv2d, FactorizedLinear
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.errors import RecipeError, StageError
from edgewright.pipeline.stage import Edit, StageResult
from edgewright.pipeline.stages.basis_sharing.stage import BasisSharingConfig, check, fit, rebuild
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.training import TrainingConfig, train_model

ROWS = {"train": 64, "calibration": 48, "validation": 48}
SHORT = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01}


def task() -> ImageClassification:
    return tiny_task(rows=ROWS)  # type: ignore[arg-type]


class Mlp(nn.Module):
    """No convolution, no attention, flat names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(144, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.out(torch.relu(self.fc3(torch.relu(self.fc2(x)))))
        return logits


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().eval()


def pruned_residual() -> nn.Module:
    """Inner widths differ from block to block, as after pruning."""
    torch.manual_seed(0)
    model = TinyResidual()
    model.blocks = nn.Sequential(Block(8, 16), Block(8, 11, 2), Block(8, 13))
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": tiny_transformer,
    "residual": tiny_residual,
    "pruned": pruned_residual,
    "mlp": mlp,
    "signal": tiny_signal,
}
# every member list that `share: always` must give with groups of up to three neighbours
GROUPS = {
    "transformer": [f"layers.{i}.attention.{n}" for i in range(3) for n in "qkv"],
    "residual": [f"blocks.{i}.conv1" for i in range(3)],
    "pruned": [f"blocks.{i}.conv1" for i in range(3)],
    "mlp": ["fc2", "fc3"],
    "signal": ["conv1", "conv2", "conv3"],
}
by_model = pytest.mark.parametrize("name", MODELS)


def run(model: nn.Module, folder: Path, context: FolderContext | None = None, **config: Any) -> StageResult:
    config = {"share": "always", "group_size": 3, "min_width": 4, **config}
    return fit(model, task(), BasisSharingConfig(**config), context or FolderContext(folder))


def inputs() -> Tensor:
    return task().splits["validation"].batch(range(16)).inputs[0]


@torch.no_grad()
def logit_error(dense: nn.Module, factorized: nn.Module) -> float:
    expected = dense(inputs())
    return float((factorized(inputs()) - expected).norm() / expected.norm())


def state_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def members_of(result: StageResult) -> list[list[str]]:
    return [group["members"] for group in result.edit.data["groups"]]


def assert_shared(model: nn.Module, result_groups: list[Mapping[str, Any]]) -> None:
    owners = []
    for group in result_groups:
        bases = [model.get_submodule(path).basis for path in group["members"]]
        assert all(basis is bases[0] for basis in bases)
        assert len({basis.weight.data_ptr() for basis in bases}) == 1
        owners.append(id(bases[0]))
    assert len(set(owners)) == len(owners), "groups do not share with each other"
    names = [name for name, _ in model.named_parameters() if ".basis." in name]
    assert len(names) == len(result_groups), "each basis is one parameter"


@by_model
def test_rebuild_gives_the_structure_and_the_weights_the_rest(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    result = run(copy.deepcopy(model), tmp_path)
    travelled = Edit(result.edit.stage, json.loads(json.dumps(result.edit.data)))
    rebuilt = rebuild(copy.deepcopy(model), travelled)
    assert list(rebuilt.state_dict()) == list(result.model.state_dict())
    assert_shared(rebuilt, result.edit.data["groups"])
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = inputs()
    assert torch.equal(rebuilt(x), result.model(x))
    assert not any(module.training for module in result.model.modules())
    assert GROUPS[name] in members_of(result)


def test_what_runs_several_times_is_factorized_once(tmp_path: Path) -> None:
    model = tiny_siamese()
    dense = count(model, (inputs()[:1],))
    result = run(copy.deepcopy(model), tmp_path, ratio=0.4, groups="matrix", updates=2)
    assert sorted(path for group in members_of(result) for path in group) == ["mix", "upper.0", "upper.2"]
    made = result.model
    assert made.upper is made.lower and made.mix is made.again and isinstance(made.again, FactorizedLinear)
    rows = {row["members"][0]: row for row in result.metrics["groups"]}
    assert rows["mix"]["macs_before"] == 2 * 12 * 24 * 24, "both calls of 12 rows each"
    assert rows["upper.2"]["macs_before"] == 2 * 6 * 24 * 24
    assert [used["seen"] for used in rows["mix"]["calibration_rows"]] == [2 * 12 * ROWS["calibration"]]
    after = count(made, (inputs()[:1],))
    saved = result.metrics["macs_before"] - result.metrics["macs_after"]
    assert dense.macs - after.macs == saved > 0
    exact = run(
        copy.deepcopy(model), tmp_path / "full", rank={"*": 12}, groups="matrix", layers={"include": ["upper.0"]}
    )
    assert logit_error(model, exact.model) < 1e-5, "a basis of full rank loses nothing, whatever calls it"


@by_model
def test_basis_stays_one_parameter_through_finetuning_and_copies(name: str, tmp_path: Path) -> None:
    result = run(MODELS[name](), tmp_path, finetune=SHORT)
    groups = result.edit.data["groups"]
    assert_shared(result.model, groups)
    assert_shared(copy.deepcopy(result.model), groups)
    untrained = run(MODELS[name](), tmp_path / "other")
    shared = result.model.get_submodule(GROUPS[name][0]).basis.weight
    assert not torch.equal(shared, untrained.model.get_submodule(GROUPS[name][0]).basis.weight), "it was trained"
    assert len(result.metrics["finetune"]) == SHORT["epochs"]


@by_model
@pytest.mark.parametrize("groups", ["matrix", "layers", "readers", "readers_and_layers"])
def test_weights_fall_by_the_ratio_and_the_report_adds_up(name: str, groups: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = sum(p.numel() for p in model.parameters())
    result = run(model, tmp_path, groups=groups, ratio=0.5, share="auto")
    after = sum(p.numel() for p in result.model.parameters())
    m = result.metrics
    assert before - after == (m["bytes_before"] - m["bytes_after"]) / 4
    assert 0.5 <= m["removed_share"] < 0.75
    assert m["macs_after_merged"] <= m["macs_after"]
    reported = [path for row in m["groups"] for path in row["members"]] + [row["path"] for row in m["dense"]]
    layers = [
        n for n, module in MODELS[name]().named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    assert sorted(reported) == sorted(layers), "every layer is accounted for"
    for row in m["groups"]:
        assert 0.0 <= row["measured_error"] < 1.0 and len(row["member_errors"]) == len(row["members"])
        assert row["bytes_after"] < row["bytes_before"]
    for row in m["decisions"]:
        assert (row["decision"] == "share") == (len(row["groups"]) == 1 and len(row["members"]) > 1)
        if row["decision"] in ("share", "split"):
            assert (row["error_shared"] < row["error_separate"]) == (row["decision"] == "share")
    assert len(result.artifacts) == len(m["groups"])


@by_model
def test_measured_error_is_that_of_the_layers_on_calibration_data(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    result = run(copy.deepcopy(model), tmp_path, max_rows=10**9)
    x = task().splits["calibration"].batch(range(ROWS["calibration"])).inputs[0]
    row = next(row for row in result.metrics["groups"] if row["members"] == GROUPS[name])
    reads: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _m, args, p=path: reads.update({p: args[0]}))
        for path in GROUPS[name]
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for path, error in zip(GROUPS[name], row["member_errors"], strict=True):
        dense, new = model.get_submodule(path), result.model.get_submodule(path)
        with torch.no_grad():
            exact = dense(reads[path])
            bias = torch.zeros(()) if dense.bias is None else dense.bias
            without_bias = exact - (bias[:, None] if isinstance(dense, nn.Conv1d) and bias.dim() else bias)
            found = float(((new(reads[path]) - exact) ** 2).sum() / (without_bias**2).sum())
        assert found == pytest.approx(error, rel=2e-3)


@by_model
def test_logits_move_with_the_ratio(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    errors = []
    for ratio in (0.0, 0.3, 0.8):
        result = run(copy.deepcopy(model), tmp_path / str(ratio), ratio=ratio)
        errors.append(logit_error(model, result.model))
    assert errors[0] < 0.5 and errors[0] < errors[1] < errors[2]


def test_biases_and_strides_are_kept(tmp_path: Path) -> None:
    result = run(pruned_residual(), tmp_path)
    convs = [result.model.get_submodule(path) for path in GROUPS["pruned"]]
    assert all(isinstance(conv, FactorizedConv2d) for conv in convs)
    assert [conv.out_channels for conv in convs] == [16, 11, 13]
    assert [conv.stride for conv in convs] == [(1, 1), (2, 2), (1, 1)]
    original = mlp()
    result = run(mlp(), tmp_path / "mlp")
    assert torch.equal(result.model.fc3.bias, original.fc3.bias)  # type: ignore[union-attr,arg-type]
    assert result.model.fc2.bias is None  # type: ignore[union-attr]
    assert isinstance(result.model.fc2, FactorizedLinear)


def test_rank_of_members_with_different_widths_follows_the_budget(tmp_path: Path) -> None:
    result = run(pruned_residual(), tmp_path, ratio=0.4)
    group = next(g for g in result.edit.data["groups"] if g["members"] == GROUPS["pruned"])
    assert group["rank"] == int(0.6 * 72 * 40 / (72 + 40))
    assert group["kind"] == "conv2d"


def test_ranks_can_be_given(tmp_path: Path) -> None:
    ranks = {g["members"][0]: g["rank"] for g in run(tiny_residual(), tmp_path, rank=5).edit.data["groups"]}
    assert ranks == {"blocks.0.conv1": 5, "blocks.0.conv2": 5}
    result = run(tiny_residual(), tmp_path / "b", rank={"*.conv1": 7}, ratio=0.5)
    ranks = {g["members"][0]: g["rank"] for g in result.edit.data["groups"]}
    assert ranks == {"blocks.0.conv1": 7, "blocks.0.conv2": int(0.5 * 144 * 24 / (144 + 24))}
    result = run(tiny_residual(), tmp_path / "c", rank={"*.conv1": 40})
    assert [row["reason"] for row in result.metrics["dense"] if "conv1" in row["path"]] == [
        "no rank at this ratio saves weights"
    ] * 3


def test_nothing_to_gain_leaves_the_model_and_says_so(tmp_path: Path) -> None:
    model = tiny_transformer()
    result = run(copy.deepcopy(model), tmp_path, rank=500, max_drop=0.0)
    assert result.edit.data == {"groups": []} and "no layer was factorized" in result.notes[0]
    assert state_bits(result.model) == state_bits(model)
    again = run(copy.deepcopy(model), tmp_path, rank=500, max_drop=0.0)
    assert again.metrics == result.metrics


def test_layers_of_different_precision_do_not_share(tmp_path: Path) -> None:
    class Mixed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))
            logits: Tensor = self.out(torch.relu(self.fc3(x.double())).float())
            return logits

    model = Mixed().eval()
    model.fc3.double()
    result = run(model, tmp_path)
    assert members_of(result) == [["fc1"], ["fc2"], ["fc3"]]
    assert result.model.fc3.basis.weight.dtype == torch.float64  # type: ignore[union-attr]
    assert torch.isfinite(result.model(inputs())).all()


@pytest.mark.parametrize("saves", [1, 2, 3])
@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_interrupted_work_goes_on_and_ends_with_the_same_bits(name: str, saves: int, tmp_path: Path) -> None:
    whole = run(MODELS[name](), tmp_path / "whole", finetune=SHORT, max_drop=1.0)
    dying = Dying(tmp_path / "cut", saves)
    with pytest.raises(KeyboardInterrupt):
        run(MODELS[name](), tmp_path, dying, finetune=SHORT, max_drop=1.0)
    resumed = run(MODELS[name](), tmp_path / "cut", finetune=SHORT, max_drop=1.0)
    assert state_bits(whole.model) == state_bits(resumed.model)
    assert whole.edit.data == resumed.edit.data
    assert json.dumps(whole.metrics) == json.dumps(resumed.metrics)
    assert_shared(resumed.model, resumed.edit.data["groups"])


def test_missed_floor_rolls_back(tmp_path: Path) -> None:
    model, x = tiny_residual(), inputs()
    # a floor needs a model that is right about something
    train_model(model, task(), TrainingConfig(epochs=6, batch_size=16), FolderContext(tmp_path / "t"), "t")
    before = state_bits(model)
    result = run(copy.deepcopy(model), tmp_path, ratio=0.95, max_drop=0.0, whitening="none")
    assert result.edit.data == {"groups": []}
    assert state_bits(result.model) == before
    assert torch.equal(rebuild(copy.deepcopy(model), result.edit)(x), result.model(x))
    assert "rolled back: validation accuracy fell from" in result.notes[0]
    assert result.metrics["rolled_back"] is True
    kept = run(copy.deepcopy(model), tmp_path / "kept", ratio=0.95, max_drop=1.0, whitening="none")
    assert kept.edit.data["groups"]
    assert kept.metrics["quality_after"] < kept.metrics["quality_before"]


def test_whitening_keeps_the_logits_better(tmp_path: Path) -> None:
    model = tiny_transformer()
    errors = []
    for whitening in ("none", "input"):
        result = run(copy.deepcopy(model), tmp_path / whitening, whitening=whitening)
        errors.append(logit_error(model, result.model))
    assert errors[1] < errors[0]


def test_non_finite_activation_names_its_layer(tmp_path: Path) -> None:
    model = tiny_transformer()
    nn.init.constant_(model.layers[1].norm2.weight, float("inf"))  # type: ignore[index,union-attr]
    with pytest.raises(StageError, match=r"'layers\.1\.up' is not finite"):
        run(model, tmp_path)


def test_non_finite_weight_names_its_layer(tmp_path: Path) -> None:
    model = tiny_transformer()
    nn.init.constant_(model.layers[1].up.weight, float("nan"))  # type: ignore[index,union-attr]
    with pytest.raises(StageError, match=r"weight of layer 'layers\.1\.up' is not finite"):
        run(model, tmp_path)


def test_zero_weights_stay_dense(tmp_path: Path) -> None:
    model = tiny_transformer()
    nn.init.zeros_(model.layers[1].up.weight)  # type: ignore[index,union-attr]
    result = run(model, tmp_path)
    assert {"path": "layers.1.up", "reason": "its weight is all zero"} in result.metrics["dense"]
    assert isinstance(result.model.layers[1].up, nn.Linear)  # type: ignore[index,union-attr]


def test_dead_inputs_do_not_matter(tmp_path: Path) -> None:
    model = tiny_transformer()
    nn.init.zeros_(model.layers[1].norm2.weight)  # type: ignore[index,union-attr]
    nn.init.zeros_(model.layers[1].norm2.bias)  # type: ignore[index,union-attr]
    result = run(model, tmp_path)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_macs_that_do_not_fall_are_noted(tmp_path: Path) -> None:
    result = run(tiny_transformer(), tmp_path, ratio=0.1)
    assert result.metrics["macs_ratio"] > 1.0
    assert "MACs of the factorized layers do not fall" in result.notes[0]
    assert run(tiny_transformer(), tmp_path / "b", ratio=0.5, groups="matrix").notes == ()


class Only(nn.Module):
    """One layer, and it gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def test_a_model_without_layers_stays_as_it_is_unless_the_recipe_names_some(tmp_path: Path) -> None:
    result = run(Only(), tmp_path, finetune={"epochs": 1}, max_drop=0.0)
    assert result.edit.data == {"groups": []} and "finetune" not in result.metrics
    assert result.notes == ("no layer of the model can be factorized (fc: gives the logits): the model is unchanged",)
    assert rebuild(Only(), result.edit).state_dict().keys() == result.model.state_dict().keys()
    assert run(Only(), tmp_path / "b", layers={"include": ["fc"]}, rank=2).edit.data["groups"]
    with pytest.raises(StageError, match=r"can be factorized \(fc: narrower than min_width 8\): name other layers"):
        run(Only(), tmp_path / "c", layers={"include": ["fc"]}, min_width=8)


def test_layers_without_a_plain_weight_are_left_and_named(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(144, 24)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(24, 4)),
    )
    result = run(model, tmp_path)
    assert result.edit.data["groups"] == [] and "1: its weight is parametrized" in result.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers": {"include": ["layer.1.up"]}}, r"layers\.include: the pattern 'layer\.1\.up' .*'layers\.1\.up'"),
        ({"layers": {"exclude": ["nothing"]}}, r"layers\.exclude: the pattern 'nothing' matches no Linear"),
        ({"rank": {"layers.*.upp": 4}}, r"rank: the pattern 'layers\.\*\.upp' matches no Linear"),
        (
            {"layers": {"include": ["f*"]}},
            r"layers\.include: none of the 1 layers .*\(fc: gives the logits\)",
        ),
    ],
)
def test_patterns_that_mean_nothing_are_refused_before_any_compute(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"basis_sharing\.{message}"):
        check(tiny_transformer(), tiny_task(), BasisSharingConfig(**config))
    check(tiny_transformer(), tiny_task(), BasisSharingConfig(layers={"include": ["layers.*"], "exclude": ["fc"]}))
