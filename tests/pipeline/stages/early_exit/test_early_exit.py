"""The early_exit stage on two topologies and both policies: quality, structure, resuming, refusals."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from stage_tester import StageCase, check_stage
from tiny import CLASSES, tiny_residual, tiny_task, tiny_transformer
from torch import Tensor, nn

from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.errors import DataError, RecipeError, StageError
from edgewright.pipeline.stage import Edit, StageResult
from edgewright.pipeline.stages.early_exit.analysis import analyse_logits
from edgewright.pipeline.stages.early_exit.stage import STAGE, EarlyExitConfig, check, collect_logits, fit
from edgewright.pipeline.stages.early_exit.stage import rebuild as rebuild_stage
from edgewright.pipeline.stages.early_exit.thresholds.limits import ExitSearchConfig
from edgewright.pipeline.stages.early_exit.thresholds.search import search_thresholds
from edgewright.pipeline.stages.early_exit.training import (
    ExitTrainingConfig,
    _Heads,
    exit_loss,
    exit_weights,
    train_heads,
)
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Batch
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.splits import TensorSplit
from edgewright.pipeline.training.evaluation import evaluate
from edgewright.pipeline.training.training import TrainingConfig, train_model

SHORT = {"epochs": 3, "batch_size": 32, "learning_rate": 0.005}
BUILD = {"residual": tiny_residual, "transformer": tiny_transformer}
POLICIES = ("class_exclusion", "max_probability")


@lru_cache(maxsize=2)
def _trained(name: str, folder: Path) -> nn.Module:
    model = BUILD[name]()
    config = TrainingConfig(epochs=8, batch_size=32, learning_rate=0.01, optimizer="adamw")
    train_model(model, tiny_task(), config, FolderContext(folder), "train")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def trained(name: str, folder: Path) -> nn.Module:
    return copy.deepcopy(_trained(name, folder / name))


def run(model: nn.Module, tmp_path: Path, task: ImageClassification | None = None, **config: object) -> StageResult:
    return fit(model, task or tiny_task(), EarlyExitConfig(**{"training": SHORT, **config}), FolderContext(tmp_path))


CASES = [
    StageCase(f"{name}-{policy}-{label}", "early_exit", {"policy": policy, "training": SHORT, **fields}, build)
    for (name, build, policy, label, fields) in [
        ("residual", tiny_residual, "class_exclusion", "joint", {"head_epochs": 2}),
        (
            "residual",
            tiny_residual,
            "max_probability",
            "frozen",
            {"freeze_backbone": True, "head_epochs": 3, "pool": 2, "hidden": 6},
        ),
        ("transformer", tiny_transformer, "class_exclusion", "greedy", {"search": "greedy", "head_epochs": 0}),
        (
            "transformer",
            tiny_transformer,
            "max_probability",
            "joint",
            {"at": ("layers.0",), "head": "token", "distillation": 0.5},
        ),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_stage_keeps_the_contract(case: StageCase, tmp_path: Path) -> None:
    check_stage(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", sorted(BUILD))
def test_fit_saves_macs_within_the_tolerance(name: str, policy: str, folder: Path, tmp_path: Path) -> None:
    task = tiny_task()
    result = run(trained(name, folder), tmp_path, policy=policy, tolerance=0.02)
    model, metrics, points = result.model, result.metrics, result.edit.data["operating_points"]
    assert isinstance(model, MultiExit)
    split = task.splits["validation"]
    logits = collect_logits(model, split)
    plain = float((logits[-1].argmax(dim=1) == split.targets).double().mean())
    # the transformer has no positions, so it can only tell left from right
    assert plain == metrics["plain_accuracy"] and plain > (0.9 if name == "residual" else 0.45)
    for point, allowed in zip(points, (0.02, 0.0, 0.06), strict=True):
        output = model.decide(logits, torch.tensor(point["thresholds"]))
        measured = float((output.label == split.targets).double().mean())
        assert point["metrics"]["accuracy"] == measured >= plain - allowed - 1e-9
        mean = torch.tensor(metrics["exit_macs"], dtype=torch.float64)[output.exit_index].mean()
        assert point["metrics"]["mean_macs"] == pytest.approx(float(mean), rel=1e-12)
    first = points[0]
    assert first["name"] == "balanced"
    assert model.thresholds.tolist() == torch.tensor(first["thresholds"], dtype=torch.float32).tolist()
    assert first["metrics"]["mean_macs"] < 0.85 * metrics["plain_macs"]
    assert evaluate(model, task, "validation").accuracy == pytest.approx(first["metrics"]["accuracy"], abs=1e-9)
    assert evaluate(model, task, "test").accuracy > plain - 0.1
    assert any("parameters" in note and "MACs" in note for note in result.notes)
    unsure = 1.64 * first["metrics"]["accuracy_error"] > 0.02
    assert any("the standard error is" in note for note in result.notes) == unsure
    rows = metrics["validation"]["rows"]
    shares = [count / sum(rows) for count in rows]
    assert shares == [first["metrics"][f"exit_share_{i}"] for i in range(4)]
    for table in result.artifacts.values():
        assert table.shape[1] == 5 and len(table) > 50


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_rebuild_needs_the_edit_alone(policy: str, folder: Path, tmp_path: Path) -> None:
    result = run(trained("residual", folder), tmp_path, policy=policy, pool=2)
    travelled = Edit("early_exit", json.loads(json.dumps(result.edit.data)))
    again = rebuild_stage(tiny_residual(), travelled)
    again.load_state_dict(result.model.state_dict(), strict=True)
    x = tiny_task().splits["test"].batch(range(16)).inputs[0]
    assert isinstance(again, MultiExit) and isinstance(result.model, MultiExit)
    for here, there in zip(result.model.all_logits(x), again.all_logits(x), strict=True):
        assert torch.equal(here, there)
    assert torch.equal(result.model(x).exit_index, again(x).exit_index)
    keys = {key.split(".")[0] for key in again.state_dict()}
    assert keys == {"base", "heads", "thresholds"}


@pytest.mark.slow
def test_the_search_can_be_repeated_from_the_edit(folder: Path, tmp_path: Path) -> None:
    """What export does after quantization."""
    result = run(trained("residual", folder), tmp_path, tolerance=0.01, max_worst_class_drop=0.1)
    assert isinstance(result.model, MultiExit)
    config = ExitSearchConfig(**result.edit.data["search"])
    assert (config.tolerance, config.max_worst_class_drop) == (0.01, 0.1)
    split = tiny_task().splits["validation"]
    logits = [x + 0.05 * torch.randn_like(x) for x in collect_logits(result.model, split)]
    macs, generator = result.metrics["exit_macs"], torch.Generator().manual_seed(0)
    points = search_thresholds(result.model, logits, split.targets, macs, config, generator)
    plain = float((logits[-1].argmax(dim=1) == split.targets).double().mean())
    assert points[0].metrics["accuracy"] >= plain - 0.01 - 1e-9


@pytest.mark.slow
def test_a_frozen_backbone_stays_bit_for_bit_and_never_equals_it(folder: Path, tmp_path: Path) -> None:
    given = trained("residual", folder)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    result = run(copy.deepcopy(given), tmp_path, freeze_backbone=True)
    after = result.model.state_dict()
    assert all(torch.equal(after[f"base.{key}"], value) for key, value in before.items())
    assert isinstance(result.model, MultiExit)
    result.model.thresholds.fill_(result.model.policy.never)
    x = tiny_task().splits["test"].batch(range(64)).inputs[0]
    assert torch.equal(result.model(x).label, given(x).argmax(dim=1))


@pytest.mark.slow
def test_heads_learn_the_same_from_cached_and_from_live_features(folder: Path, tmp_path: Path) -> None:
    """The same rows in the same order; only the standardisation may differ in the last digits."""

    class Live(ImageClassification):
        def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
            return Batch(batch.inputs, batch.targets)

    plain = tiny_task()
    live = Live(plain.splits, plain.labels)
    results = [
        run(trained("residual", folder), tmp_path / name, task, freeze_backbone=True, head_epochs=5)
        for name, task in (("cached", plain), ("live", live))
    ]
    x = plain.splits["test"].batch(range(32)).inputs[0]
    one, other = (r.model.all_logits(x) for r in results)  # type: ignore[operator]
    for here, there in zip(one, other, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", [0, 5])
def test_standardisation_is_folded_into_the_first_layer(hidden: int) -> None:
    base = nn.Sequential(nn.Identity(), nn.Identity())
    model = MultiExit(base, [HeadSpec("0", 4, hidden=hidden)], [2], 3, "max_probability").eval()
    generator = torch.Generator().manual_seed(0)
    mean, scale = 5.0 * torch.randn(4, generator=generator), 0.1 + torch.rand(4, generator=generator)
    heads = _Heads(model, [mean], [scale], generator)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, generator=generator)
    heads.fold_into(model)
    x = mean + scale * torch.randn(6, 4, generator=generator)
    torch.testing.assert_close(model.all_logits(x)[0], heads(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_places_are_found_where_they_save_most(folder: Path, tmp_path: Path) -> None:
    given = trained("residual", folder)
    found = run(copy.deepcopy(given), tmp_path, auto=1, freeze_backbone=True, head_epochs=5, tolerance=0.02)
    placement = found.metrics["placement"]
    assert placement["candidates"] == ["stem", "blocks.0", "blocks.1"] and placement["tried"] == 3
    assert found.metrics["exits"] == [placement["candidates"][i] for i in placement["chosen"]]
    assert placement["within"] and found.edit.data["operating_points"][0]["metrics"]["mean_macs"] < (
        (placement["mean_cost"] + 0.02) * found.metrics["plain_macs"]
    ), "what the cheap heads promised is kept"


def test_the_features_scale_does_not_matter_to_the_heads(folder: Path, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        """The same network, seen through an enormous shift and scale."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.look = base, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.base.blocks[0](self.base.stem(x))
            self.look(1e3 * y + 500.0)
            logits: Tensor = self.base.fc(self.base.blocks[2](self.base.blocks[1](y)).mean(dim=(2, 3)))
            return logits

    accuracy = []
    for model, at in ((trained("residual", folder), "blocks.0"), (Scaled(trained("residual", folder)), "look")):
        network = MultiExit(model.eval(), [HeadSpec(at, 8)], [4], CLASSES, "max_probability").eval()
        config = ExitTrainingConfig(freeze_backbone=True, head_epochs=10, training=TrainingConfig(batch_size=32))
        train_heads(network, tiny_task(), config, FolderContext(tmp_path / at), augment=True)
        split = tiny_task().splits["validation"]
        head = collect_logits(network, split)[0]
        accuracy.append(float((head.argmax(dim=1) == split.targets).double().mean()))
    assert accuracy[0] > 0.5 and abs(accuracy[0] - accuracy[1]) < 0.05


def test_features_that_hardly_vary_lift_no_rounding_errors(folder: Path, tmp_path: Path) -> None:
    class Nearly(nn.Module):
        """Shows features that differ in their last digits alone."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.look = base, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.base.blocks[0](self.base.stem(x))
            self.look(1e-3 * y + 10.0)
            logits: Tensor = self.base.fc(self.base.blocks[2](self.base.blocks[1](y)).mean(dim=(2, 3)))
            return logits

    network = MultiExit(
        Nearly(trained("residual", folder)).eval(), [HeadSpec("look", 8)], [4], CLASSES, "max_probability"
    ).eval()
    config = ExitTrainingConfig(freeze_backbone=True, head_epochs=10, training=TrainingConfig(batch_size=32))
    train_heads(network, tiny_task(), config, FolderContext(tmp_path), augment=True)
    split = tiny_task().splits["validation"]
    found, exact = collect_logits(network, split)[0], network.double()
    with torch.no_grad():
        features, _ = exact.pooled(split.batch(range(len(split))).inputs[0].double())
        wanted = exact.head(0).classify(features[0])
    assert float((found - wanted).abs().max()) < 1e-4 and float(found.std()) > 0


@pytest.mark.slow
def test_joint_training_that_ruins_the_network_is_undone(folder: Path, tmp_path: Path) -> None:
    given = trained("transformer", folder)
    ruinous = {"epochs": 1, "batch_size": 32, "learning_rate": 0.5, "optimizer": "adamw", "gradient_clip": 1.0}
    result = run(copy.deepcopy(given), tmp_path, training=ruinous)
    assert any("undone" in note for note in result.notes)
    assert result.metrics["plain_accuracy"] == result.metrics["given_accuracy"]
    kept = result.model.state_dict()
    assert all(torch.equal(kept[f"base.{key}"], value) for key, value in given.state_dict().items())
    damaged = run(copy.deepcopy(given), tmp_path / "kept", training=ruinous, max_backbone_drop=None)
    assert damaged.metrics["plain_accuracy"] < damaged.metrics["given_accuracy"] - 0.02


@pytest.mark.slow
def test_joint_training_that_diverges_is_undone(folder: Path, tmp_path: Path) -> None:
    given = trained("residual", folder)
    diverging = {"epochs": 2, "batch_size": 32, "learning_rate": 1e9}
    result = run(copy.deepcopy(given), tmp_path / "undone", training=diverging, head_epochs=2)
    assert any("not finite" in note or "is nan" in note or "is inf" in note for note in result.notes)
    assert any("undone" in note for note in result.notes)
    kept = result.model.state_dict()
    assert all(torch.equal(kept[f"base.{key}"], value) for key, value in given.state_dict().items())


@pytest.mark.slow
def test_every_exit_is_used_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    result = run(trained("residual", folder), tmp_path, tolerance=0.1, min_share=0.05)
    assert result.metrics["min_share_met"]["balanced"] is True
    rows = result.metrics["validation"]["rows"]
    assert min(rows) >= 0.05 * sum(rows)


def test_exit_analysis_by_hand() -> None:
    base = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    model = MultiExit(base, [HeadSpec("0", 3), HeadSpec("1", 3)], [2, 2], 3, "class_exclusion")
    model.thresholds.copy_(torch.tensor([0.5, 0.5]))
    hi, lo = 4.0, -4.0
    first = torch.tensor([[hi, lo, lo], [hi, hi, lo], [hi, hi, hi], [lo, hi, lo]])
    second = torch.tensor([[hi, hi, hi], [lo, 5.0, lo], [hi, hi, lo], [hi, hi, hi]])
    last = torch.tensor([[0.0, 0.0, 9.0]] * 4)
    # row 0 and 3 leave at 0 (row 3 wrongly), row 1 at 1, row 2 ends with classes 0 and 1 left, its own excluded
    found = analyse_logits(model, [first, second, last], torch.tensor([0, 1, 2, 2]))
    assert found.rows == (2, 1, 1)
    assert found.accuracy == (0.5, 1.0, 0.0)
    assert found.per_class == ((1, 0, 0), (0, 1, 0), (1, 0, 1))
    assert found.mean_depth == (0.0, 1.0, 1.0)
    assert found.survivors == ((0, 2, 1, 1), (0, 1, 1, 0))
    assert found.wrong_exclusions == (0.25, 0.5)
    assert found.wrong_exclusion_rate == 0.5
    assert found.right_per_class == ((1, 0, 0), (0, 1, 0), (0, 0, 0))
    assert found.confusions == ((2, 0, 1, 1), (2, 1, 1, 1)), "the network's own end says 2 for every row"
    assert (found.lost, found.won) == (2, 2)


def test_the_loss_is_the_published_one() -> None:
    assert exit_weights(3) == [1 / 4, 1 / 3, 1 / 2]
    z, y = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([2])
    other, sigmoid = ExitTrainingConfig(kappa=2.0), torch.sigmoid(z[0])
    terms = [-(1 - sigmoid[0]).log(), -(1 - sigmoid[1]).log(), -sigmoid[2].log()]

    def loss(policy: str, config: ExitTrainingConfig) -> float:
        return float(exit_loss([z], z, y, [0.5], policy, config))

    meant = 0.5 * (terms[0] + terms[1] + 8.0 * terms[2]) / 3 / 2.0
    assert loss("class_exclusion", other) == pytest.approx(float(meant), rel=1e-5)
    released = 0.5 * 8.0 * (terms[0] + terms[1] + terms[2]) / 3
    uniform = ExitTrainingConfig(exit_loss_mode="uniform_scale")
    assert loss("class_exclusion", uniform) == pytest.approx(float(released), rel=1e-5)
    entropy = 0.5 * nn.functional.cross_entropy(z, y)
    for policy in ("max_probability", EarlyExitConfig().policy):  # what is published is asked for by its name
        assert loss(policy, ExitTrainingConfig()) == pytest.approx(float(entropy), rel=1e-5)
    same = ExitTrainingConfig(distillation=1.0)
    assert loss("max_probability", same) == pytest.approx(float(entropy), rel=1e-5), "no divergence from itself"


class TwoInputs(nn.Module):
    """An image and a number per row."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.number = nn.Linear(144, 12), nn.Linear(1, 12)
        self.hidden, self.fc = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.relu(self.image(x.flatten(1)) + self.number(y))
        logits: Tensor = self.fc(torch.relu(self.hidden(both)))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_two_inputs_and_two_classes(policy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    splits = {}
    for name, rows in (("train", 96), ("validation", 64)):
        y = torch.arange(rows) % 2
        x = torch.randn(rows, 1, 12, 12)
        splits[name] = TensorSplit([x, (2.0 * y - 1.0)[:, None] + 0.3 * torch.randn(rows, 1)], y)
    task = ImageClassification(splits, ["no", "yes"], input_name=["image", "word"])  # type: ignore[arg-type]
    result = run(TwoInputs().eval(), tmp_path, task, policy=policy, at=("image",))
    assert isinstance(result.model, MultiExit)
    assert result.model.all_logits(*splits["train"].batch([0, 1]).inputs)[0].shape == (2, 2)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = tiny_residual()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.base(x)}


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    task = tiny_task()
    ten = ImageClassification(task.splits, [str(i) for i in range(10)])
    with pytest.raises(DataError, match="class '4' has no sample in the 'train' split"):
        run(tiny_residual(), tmp_path, ten)
    three = nn.Sequential(tiny_residual(), nn.Linear(4, 3)).eval()
    with pytest.raises(StageError, match=r"returns \[1, 3\].*4 labels"):
        run(three, tmp_path, task)
    with pytest.raises(StageError, match=r"Wrapped returns a dict.*wrap it in a module"):
        run(Wrapped().eval(), tmp_path, task)
    with pytest.raises(RecipeError, match=r"no input 'mask'; it has 'image'"):
        check(tiny_residual(), task, EarlyExitConfig(mask="mask"))
    with pytest.raises(RecipeError, match=r"token reads one of the tokens.*'stem' returns \[1, 8, 12, 12\]"):
        check(tiny_residual(), task, EarlyExitConfig(at=("stem",), head="token"))
    with pytest.raises(RecipeError, match=r"no module 'layer3'"):
        run(tiny_residual(), tmp_path, task, at=("layer3",))
    no_validation = ImageClassification({"train": task.splits["train"]}, task.labels)
    with pytest.raises(DataError, match="no 'validation' split"):
        run(tiny_residual(), tmp_path, no_validation)
    for wrong, message in (
        ({"at": ("stem",), "at_macs": (0.5,)}, "not both"),
        ({"at_macs": ()}, "at least one place"),
        ({"at_macs": (1.5,)}, "between 0 and 1"),
        ({"at": ("stem",), "auto": 2}, "give `at` or `auto`, not both"),
        ({"head": "token", "mask": "m"}, "reads one token"),
        ({"policy": "entropy", "max_wrong_exclusion": 0.1}, "entropy does not"),
        ({"freeze_backbone": True, "head_epochs": 0}, "would train nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyExitConfig(**wrong)
    assert "early_exit" in STAGE.forbids and "test" not in STAGE.splits


def test_a_network_without_a_place_for_an_exit_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4)).eval()
    result = run(model, tmp_path, tiny_task())
    assert result.model is model and rebuild_stage(model, result.edit) is model
    assert len(result.notes) == 1 and "no exit was added and Sequential is unchanged" in result.notes[0]


def test_places_that_do_not_exist_are_refused_before_any_compute() -> None:
    model, task = tiny_residual(), tiny_task()
    for at, message in (("layer3", "no module 'layer3'"), ("fc", "nothing is left to save.*places near it are")):
        with pytest.raises(RecipeError, match=rf"early_exit\.at: .*{message}"):
            check(model, task, EarlyExitConfig(at=(at,)))
    check(model, task, EarlyExitConfig(at=("blocks.1",)))
    check(model, task, EarlyExitConfig())
