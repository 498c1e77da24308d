"""The tester of stages refuses what it is there to refuse."""

from __future__ import annotations

import pytest
import stage_tester
import torch
from tiny import tiny_residual, tiny_task

from edgewright.pipeline.stage import Edit, Stage, StageConfig, StageResult


class Config(StageConfig):
    quick: bool = False
    """Reads less."""


def stage_with(splits_for):
    return Stage("made_up", Config, None, None, splits=("train", "validation"), splits_for=splits_for)


def test_a_split_that_the_configuration_does_not_need_cannot_be_read():
    stage = stage_with(lambda config: ("train",) if config.quick else ("train", "validation"))
    task = stage_tester._Declared(tiny_task(), stage, Config(quick=True))
    assert "validation" in task.splits, "a run has it too: a stage must not behave differently here"
    assert len(task.splits["train"]) == 256
    with pytest.raises(AssertionError, match="reads the split 'validation'"):
        task.splits["validation"]
    with pytest.raises(KeyError):
        task.splits["nonsense"]
    assert len(stage_tester._Declared(tiny_task(), stage, Config()).splits["validation"]) == 128


@pytest.mark.parametrize(
    ("notes", "passes"),
    [
        ((), False),
        (("the weather was fine",), False),
        (("MACs stay",), False),
        (("parameters are shared already",), False),
        (("MACs and parameters stay: values change, not structure",), True),
        (("MACs stay", "nothing of the parameters could go"), True),
    ],
)
def test_a_stage_that_saves_nothing_has_to_name_what_stayed(notes, passes):
    model = tiny_residual()
    result = StageResult(model, Edit("made_up"), notes=notes)
    inputs = (torch.zeros(1, 1, 12, 12),)
    if passes:
        stage_tester._check_cost(model, result, inputs)
        return
    with pytest.raises(AssertionError, match="go from"):
        stage_tester._check_cost(model, result, inputs)
