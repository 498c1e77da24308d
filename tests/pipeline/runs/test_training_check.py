"""One step of every training is tried before any compute: what would fail in it is bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unlabelled import Regression, network

from edgewright.pipeline.errors import InputError, ModelError, RecipeError
from edgewright.pipeline.runs.model_check import check_exportable, check_model
from edgewright.pipeline.runs.training_check import PlannedTraining, check_training
from edgewright.pipeline.stage_registry import stage_named
from edgewright.pipeline.stages.early_exit.stage import EarlyExitConfig
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.training.training import TrainingConfig, trainings_in


def images(rows: int = 9) -> ImageClassification:
    y = torch.arange(rows) % 3
    x = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageClassification({"train": (x, y), "test": (x + 1, y)}, list("abc"))


class Net(nn.Module):
    """A convolution, something at its pooled output [N, 8, 1, 1], and logits; `back` makes what is returned."""

    def __init__(self, norm: nn.Module | None = None, back: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, 2), norm or nn.Identity(), nn.Linear(8, 3)
        self.back = back or (lambda model, logits: logits)

    def forward(self, x: Tensor) -> Any:
        pooled = self.norm(self.conv(x).mean((2, 3), keepdim=True))
        return self.back(self, self.fc(pooled.flatten(1)))


def trained(model: nn.Module, task: Any = None, samples: int = 9, **config: Any) -> None:
    planned = PlannedTraining("train", TrainingConfig(**config), samples)
    check_training(model, task or images(), [planned], "net")


def test_batch_norm_on_a_batch_of_one_row_is_bad_input() -> None:
    model = Net(nn.BatchNorm2d(8))
    with pytest.raises(RecipeError, match=r"^train\.batch_size is 1, .*failed in 'norm', BatchNorm2d.* Set it to 2"):
        trained(model, batch_size=1)
    with pytest.raises(RecipeError, match="the train split has one sample"):
        trained(model, images(1), samples=1)
    trained(model, batch_size=2)
    trained(model, batch_size=8)  # of nine rows: the last one is left out
    trained(model, batch_size=1, epochs=0)
    trained(Net(), batch_size=1)


@pytest.mark.parametrize(
    ("norm", "rows"), [(nn.InstanceNorm2d(8), 1), (nn.InstanceNorm2d(8), 4), (nn.GroupNorm(8, 8), 1)]
)
def test_a_norm_over_a_single_number_is_named_with_what_helps(norm: nn.Module, rows: int) -> None:
    with pytest.raises(InputError, match=r"in 'norm', .*: one number is left per channel"):
        trained(Net(norm), batch_size=rows)
    trained(Net(nn.GroupNorm(2, 8)), batch_size=rows)


def both(model: nn.Module, logits: Tensor) -> Any:
    """As classifiers of detection libraries: logits while trained, probabilities and logits afterwards."""
    return logits if model.training else (logits.softmax(1), logits)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, pick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, x: Tensor) -> Any:
        return self.pick(self.model(x))


def test_the_wrapper_that_is_advised_fits_both_modes() -> None:
    with pytest.raises(ModelError) as caught:
        check_model(Net(back=both).eval(), images(), "net")
    text = str(caught.value)
    assert "`out = self.model(*inputs)`" in text and "else out[1]`" in text  # out[0] are probabilities
    advised = Wrapped(Net(back=both), lambda out: out if isinstance(out, torch.Tensor) else out[1])
    check_model(advised.eval(), images(), "net")
    trained(advised)
    with pytest.raises(ModelError, match=r"float32 \[3\] in training mode and float32 \[2, 3\] in eval .*isinstance"):
        trained(Wrapped(Net(back=both), lambda out: out[0]))
    with pytest.raises(ModelError, match=r"returns a tuple of 2 .* in training mode"):
        trained(Net(back=lambda model, logits: (logits, logits) if model.training else logits))


def test_a_task_without_classes_is_told_no_shape_of_logits() -> None:
    for back in (lambda x: (x, x), lambda x: {"values": x}, lambda x: x.mean(), lambda x: x.argmax(1)):
        with pytest.raises(ModelError, match="float tensor") as caught:
            check_model(Wrapped(network(), back).eval(), Regression(), "net")
        assert "classifier" not in str(caught.value) and "logits" not in str(caught.value)
    check_model(Wrapped(network(1), lambda x: x[:, 0]).eval(), Regression(1), "net")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"Return `\.float\(\)`"):
        check_model(Wrapped(Net(), lambda x: x.to(dtype)).eval(), images(), "net")


class Losing(Regression):
    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.own = loss

    def loss(self, output: Tensor, targets: Tensor) -> Any:
        return self.own(output, targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: (x - y).square(), r"is float32 \[2, 2\], and training needs the mean"),
        (lambda x, y: (x - y).square().mean().item(), "is a float, and training"),
        (lambda x, y: (x - y).detach().square().mean(), "has no gradient"),
        (
            lambda x, y: (x - y[:, :1, None]).view(-1)[100],
            r"fails on what the model returns, float32 \[2, 2\], and targ",
        ),
    ],
)
def test_a_loss_that_cannot_be_trained_with(loss: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        trained(network(), Losing(loss))


def test_smoothing_without_classes_is_refused_before_any_compute() -> None:
    with pytest.raises(RecipeError, match=r"^train: label_smoothing is 0.1"):
        trained(network(), Regression(), label_smoothing=0.1)
    trained(network(), Regression())


def test_which_trainings_a_stage_does() -> None:
    exits = stage_named("early_exit").trains
    assert exits is not None
    assert exits(EarlyExitConfig(freeze_backbone=True)) == {} and list(exits(EarlyExitConfig())) == ["training"]
    train = stage_named("train").config(epochs=2)
    assert trainings_in(train) == {"": train}
    assert list(trainings_in(stage_named("class_aware_pruning").config(finetune={"epochs": 1}))) == [
        "retrain",
        "finetune",
    ]


class ComparesRows(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.shape[0] == 2 else super().forward(x + 0)


@pytest.mark.slow
def test_one_row_a_run_is_offered_where_forward_compares_shapes_and_it_helps() -> None:
    with pytest.raises(ModelError, match=r"`export\.batch: single` does too"):
        check_exportable(ComparesRows().eval(), images(), "net", dynamic=True)
    check_exportable(ComparesRows().eval(), images(), "net", dynamic=False)

    def branching(model: nn.Module, logits: Tensor) -> Tensor:
        return logits if logits.sum() > 0 else 2 * logits

    with pytest.raises(ModelError) as caught:
        check_exportable(Net(back=branching).eval(), images(), "net", dynamic=True)
    assert "single" not in str(caught.value)
