"""What is wrong with a recipe for this model, this data and this machine is said before anything is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from recipes_on_disk import without_later_phases, write_recipe
from tiny import tiny_task
from torch import nn
from unlabelled import Rows

from edgewright.pipeline.errors import DataError, EdgewrightError, InputError, ModelError, ProviderError, RecipeError
from edgewright.pipeline.recipe.recipe import Requirements, load_recipe
from edgewright.pipeline.runs.control import check_control, control_recipe
from edgewright.pipeline.runs.model_check import check_model
from edgewright.pipeline.runs.preparation import check_inputs, check_labels, prepare, remarks
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.store.checkpoint import load_checkpoint
from edgewright.pipeline.tasks.image_classification import ImageClassification

TRAIN = {"name": "train", "epochs": 1}


def refused(folder: Path, kind: type[EdgewrightError] = InputError, **changes: Any) -> str:
    """The message with which a recipe is refused; proves that no stage, not even the base, was stored."""
    path = write_recipe(folder, **changes)
    with pytest.raises(kind) as caught:
        run(load_recipe(path), folder / "out")
    assert not list((folder / "out").glob("checkpoints/*")), "something was computed"
    return str(caught.value)


def test_names_that_the_model_does_not_have(tmp_path: Path) -> None:
    exits = {"name": "early_exit", "at": ["3"]}
    assert "no module '3'; the nearest places" in refused(tmp_path / "a", stages=[TRAIN, exits])
    shared = {"name": "basis_sharing", "layers": {"include": ["fc*"]}}
    split = {"name": "python:data.py:task", "args": {"splits": ["train", "calibration", "test"]}}
    assert "'fc*' matches no Linear" in refused(tmp_path / "b", stages=[TRAIN, shared], task=split)


def test_stages_that_find_nothing_to_do_leave_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_later_phases(monkeypatch)
    everything = ["train", "calibration", "validation", "test"]
    path = write_recipe(
        tmp_path,
        task={"name": "python:data.py:task", "args": {"splits": everything}},
        stages=[TRAIN, {"name": "basis_sharing"}, {"name": "early_exit"}],
    )
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(5, 3)\n")
    result = run(load_recipe(path), tmp_path / "out")
    trained, shared, exits = result.steps[-3:]
    assert "it is the whole model" in shared.notes[0] and "no exit was added" in exits.notes[0]
    assert trained.parameters == shared.parameters == exits.parameters and exits.exit_shares == ()


def test_an_exit_and_an_open_batch(tmp_path: Path) -> None:
    stages = [TRAIN, {"name": "early_exit"}]
    assert "export.batch is `dynamic`" in refused(tmp_path, stages=stages, export={"batch": "dynamic"})


def test_requirements_that_no_stage_can_meet(tmp_path: Path) -> None:
    assert "without the stage 'early_exit'" in refused(tmp_path / "a", stages=[TRAIN], require={"every_exit": True})
    assert "without the stage 'basis_sharing'" in refused(
        tmp_path / "b", stages=[TRAIN], require={"shared_basis": True}
    )


def test_providers_that_are_not_here(tmp_path: Path) -> None:
    lost = {"providers": ["OpenVINOExecutionProvider"]}
    assert "asks for OpenVINOExecutionProvider, and this ONNX" in refused(tmp_path / "a", ProviderError, benchmark=lost)
    assert "did you mean 'cuda'" in refused(tmp_path / "b", RecipeError, benchmark={"providers": ["cudaa"]})


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"argument": "widht", "between": [2, 8]}, r"has no argument 'widht' (did you mean 'width'?)"),
        ({"argument": "width", "between": [2.5, 8]}, "does not work with width from 2.5 to 8"),
        ({"argument": "width", "between": [6, 6]}, "it must make the model larger"),
    ],
)
def test_a_control_that_cannot_be_built(tmp_path: Path, control: dict[str, Any], message: str) -> None:
    text = refused(tmp_path, RecipeError, control={**control, "training": {"epochs": 1}})
    assert text.startswith("control") and message in text


def own_model(folder: Path, body: str, **changes: Any) -> str:
    """The message for a model whose forward is `body`, with `self.layer` a Linear from 5 to 3."""
    write_recipe(folder)
    source = (
        "import torch\nfrom torch import nn\nclass net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layer = nn.Linear(5, 3)\n    def forward(self, x):\n"
        + "".join(f"        {line}\n" for line in body.splitlines())
    )
    path = write_recipe(folder, **changes)
    (folder / "net.py").write_text(source)
    with pytest.raises(ModelError) as caught:
        run(load_recipe(path), folder / "out")
    return str(caught.value)


def test_a_branch_on_values_is_found_before_training_with_its_line(tmp_path: Path) -> None:
    text = own_model(tmp_path, "y = self.layer(x)\nif y.mean() > 0:\n    y = 2 * y\nreturn y")
    assert "could be trained, but not exported in " in text and "net.py, line 9" in text and "torch.where" in text


def test_a_fixed_number_of_rows_is_found_before_training(tmp_path: Path) -> None:
    text = own_model(tmp_path / "a", "return self.layer(x).view(2, 3) if not self.training else self.layer(x)")
    assert "not exported" in text and "any number of rows" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'loss': x.sum(), 'logits': self.layer(x)}", "a dict {'loss': float32 [], 'logits': float32 [2, 3]}"),
        ("return {'loss': x.sum(), 'logits': self.layer(x)}", "forward is `return self.model(*inputs)['logits']`"),
        ("return self.layer(x), x", "a tuple of 2 (float32 [2, 3], float32 [2, 5])"),
        ("return self.layer(x)[:, 0]", "returns float32 [2] for inputs [2, 5]"),
        ("return self.layer(x[:, :4])", "takes 5 features and gets 4"),
        ("return self.layer(x - x.mean(dim=0))", "answers a row otherwise when another is beside it (off by "),
        ("return self.layer(x).squeeze()", "answers one row with [3], and [1, 3] is needed"),
    ],
)
def test_what_a_model_returns_or_takes_is_described(tmp_path: Path, body: str, message: str) -> None:
    assert message in own_model(tmp_path, body)


def test_several_inputs_have_as_many_names() -> None:
    ids, y = torch.arange(80).view(40, 2), torch.arange(40) % 2
    names = ["input_ids", "attention_mask"]
    task = ImageClassification.from_arrays([ids, ids % 2], y, ["no", "yes"], input_name=names)
    check_inputs(task)
    assert task.input_names == tuple(names) and task.dynamic_axes == ({0: "batch"},) * 2
    first, second = task.splits["test"].batch([0, 1]).inputs
    assert torch.equal(first % 2, second), "rows stay together"
    with pytest.raises(DataError, match=r"have 2 input\(s\) and there are 1 input_names \(image\)"):
        check_inputs(ImageClassification.from_arrays([ids, ids % 2], y, ["no", "yes"]))


def test_a_model_with_more_inputs_than_the_task(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass net(nn.Module):\n    def forward(self, x, mask):\n        return x[:, :3] * mask\n"
    )
    with pytest.raises(ModelError, match="missing 1 required positional argument: 'mask'"):
        run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")


def test_grey_images_for_a_model_of_colour_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 4))
    with pytest.raises(ModelError, match=r"failed in '0', Conv2d\(3, 4.*takes 3 channels and the data has 1"):
        check_model(model, tiny_task(), "net")


def test_a_damaged_image_of_any_split(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for row in range(6):
            place = tmp_path / "images" / split / f"kind{row % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{row}.png")
    bad = tmp_path / "images" / "test" / "kind1" / "5.png"
    bad.write_bytes(bad.read_bytes()[:60])
    args = {"path": "images", "size": 8, "channels": 1, "fractions": {"train": 1.0}}
    write_recipe(tmp_path)
    source = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
    path = write_recipe(tmp_path, task={"name": "image_folder", "args": args})
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(DataError, match=r"images/test/kind1/5\.png cannot be read as an image"):
        run(load_recipe(path), tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def small(rows: dict[str, list[int]], labels: int = 3) -> ImageClassification:
    generator = torch.Generator().manual_seed(0)
    splits = {name: (torch.randn(len(y), 5, generator=generator), y) for name, y in rows.items()}
    return ImageClassification(splits, [f"kind{i}" for i in range(labels)])


def remarks_on(task: ImageClassification, folder: Path, **changes: Any) -> tuple[str, ...]:
    inputs = prepare(load_recipe(write_recipe(folder, **changes)))
    return remarks(dataclasses.replace(inputs, task=task))


def test_classes_without_samples_are_said(tmp_path: Path) -> None:
    whole = [0, 1, 2] * 4
    task = small({"train": whole, "validation": [0, 1] * 6, "test": [2, 0]})
    absent, unjudged = remarks_on(task, tmp_path)
    assert "no sample in the 'validation' split of 1 of 3 classes ('kind2')" in absent
    assert "('kind1')" in unjudged and "cannot judge" in unjudged
    assert remarks_on(small({"train": whole, "test": whole}), tmp_path) == ()
    with pytest.raises(DataError, match="the one label 'kind0'"):
        check_labels(small({"train": [0, 0], "test": [0]}, labels=1))


def test_a_tolerance_finer_than_one_validation_sample_is_said(tmp_path: Path) -> None:
    exits = {"name": "early_exit", "tolerance": 0.005}
    coarse = small({"train": [0, 1, 2] * 4, "validation": [0, 1, 2] * 10, "test": [0, 1, 2]})
    notes = remarks_on(coarse, tmp_path / "a", stages=[TRAIN, exits])
    assert len(notes) == 1 and "early_exit.tolerance (0.005), early_exit.max_backbone_drop (0.02): one" in notes[0]
    assert "30 validation samples is worth 0.033" in notes[0]
    fine = remarks_on(coarse, tmp_path / "b", stages=[TRAIN, {**exits, "tolerance": 0.05, "max_backbone_drop": 0.05}])
    assert fine == ()


def test_a_control_of_an_argument_that_takes_whole_numbers(tmp_path: Path) -> None:
    control = {"argument": "width", "between": [2, 40], "training": {"epochs": 1}}
    everything = {"name": "python:data.py:task", "args": {"splits": ["train", "validation", "test"]}}
    stages, wanted = [TRAIN, {"name": "early_exit"}], {"every_exit": True}
    inputs = prepare(
        load_recipe(write_recipe(tmp_path, control=control, task=everything, stages=stages, require=wanted))
    )
    spec = inputs.recipe.control
    assert spec is not None
    check_control(inputs, spec)
    made = control_recipe(inputs, spec, 8 * 13.2)
    assert made.model.args == {"width": 13}
    assert prepare(made).recipe.require == Requirements(), "what the result must fulfil does not hold for the control"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0.5, 1.0, 2.25, 0.0], "target of sample 0 is 0.5, which is no class index"),
        (torch.eye(4), r"shape \[4, 4\]; one class index per sample .*argmax"),
        ([0, 1, 7, 1], r"sample 2 .* has class 7, and there are 3 labels, for classes 0 to 2: number"),
    ],
)
def test_targets_that_are_no_classes(targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageClassification({"train": (torch.zeros(4, 2), targets)}, list("abc"))


def test_targets_of_a_dataset_that_are_no_classes() -> None:
    with pytest.raises(DataError, match=r"the target of sample 0 is 0\.25"):
        ImageClassification({"train": [(torch.zeros(2), 0.25)]}, list("abc"))
    whole = ImageClassification({"train": (torch.zeros(3, 2), torch.tensor([[0.0], [2.0], [1.0]]))}, list("abc"))
    assert whole.splits["train"].targets.tolist() == [0, 2, 1]


class Given(ImageClassification):
    """A task whose splits are taken as they are."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, labels: str = "abc") -> None:
        super().__init__({"train": (torch.zeros(3, 5), torch.arange(3))}, list("abc"))
        self.given = {"test": Rows(inputs, targets)}
        self.names = tuple(labels)

    @property
    def splits(self) -> Any:
        return self.given

    @property
    def labels(self) -> tuple[str, ...]:
        return self.names


@pytest.mark.parametrize(
    ("targets", "labels", "message"),
    [
        (torch.tensor([0, 3]), "abc", "has the target 3, and the 3 labels are numbered from 0 to 2"),
        (torch.tensor([0, -1]), "abc", "has the target -1"),
        (torch.tensor([0.0, 1.0]), "abc", r"targets float32 \[2\], and the task has labels"),
        (torch.zeros(2, 4, dtype=torch.int64), "abc", r"targets int64 \[2, 4\], and the task has labels"),
        (torch.zeros(2, dtype=torch.bfloat16), "", "has targets in bfloat16"),
    ],
)
def test_targets_that_are_none_of_the_labels(targets: torch.Tensor, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(Given(torch.zeros(2, 5), targets, labels))
    check_labels(Given(torch.zeros(2, 5), torch.tensor([2, -100])))


def test_samples_in_half_precision(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the input 'image' of split 'test' .* is float16: give it in float32"):
        check_inputs(Given(torch.zeros(2, 5).half(), torch.tensor([0, 1])))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_runs_in_float32_and_that_is_said(tmp_path: Path, dtype: str) -> None:
    path = write_recipe(tmp_path, stages=[TRAIN])
    source = (tmp_path / "net.py").read_text().replace("def net", "def plain")
    (tmp_path / "net.py").write_text(source + f"\ndef net():\n    return plain().to(torch.{dtype})\n")
    result = run(load_recipe(path), tmp_path / "out")
    assert any(f"net.py:net comes with {dtype} weights" in note for note in result.steps[0].notes)
    assert load_checkpoint(result.out / result.steps[0].checkpoint).state_dict()["0.weight"].dtype == torch.float32
