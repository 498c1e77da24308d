"""What every stage must hold: `check_stage` runs one case through all of it.

Repeatable, independent of torch's global random state and of splits it does not declare; resumable with the
same bits; rebuilt bit-equal in a fresh process from its checkpoint alone; cheaper, or a note says why not; exported
with parity on every exit and nothing stored twice.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fresh_process import logits_in_a_fresh_process
from tiny import tiny_residual, tiny_task
from torch import Tensor, nn

from edgewright.edge_runtime.answers.table import kind_of
from edgewright.export import export_bundle
from edgewright.export.accounts.ledger import shared_bases
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.stage import Edit, Stage, StageConfig, StageResult, State
from edgewright.pipeline.stage_registry import stage_named
from edgewright.pipeline.store.atomic import pretty_json
from edgewright.pipeline.store.checkpoint import BaseSpec, save_checkpoint
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Split, Task

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class StageCase:
    """One stage with one configuration on one model.

    Attributes:
        id: name of the test.
        stage: name of the stage.
        config: fields of its configuration.
        model: a function of tests/tiny.py.
        task: makes the task.
        prior: stages to run before, with their fields.
    """

    id: str
    stage: str
    config: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = tiny_residual
    task: Callable[[], Task] = tiny_task
    prior: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def base(self) -> BaseSpec:
        """How a checkpoint names the model."""
        return BaseSpec(f"python:tiny.py:{self.model.__name__}")


def check_stage(case: StageCase, tmp_path: Path) -> StageResult:
    """Runs every check of this file and returns the stage's result, for checks that only the case knows."""
    stage = stage_named(case.stage)
    config = stage.config(**case.config)
    task = case.task()
    given, edits = _model_before(case, task, tmp_path)
    # images may come with their channels last in memory, which a file does not keep and a kernel may go by
    inputs = tuple(
        x.clone(memory_format=torch.contiguous_format) for x in task.splits["test"].batch(list(range(8))).inputs
    )

    first, saves = _fit(stage, config, given, task, tmp_path / "first", torch_seed=1)
    _check_result(case, first)
    again, _ = _fit(stage, config, given, task, tmp_path / "again", torch_seed=2)
    assert_same(first, again, "a second fit")
    _check_edit(first.edit, given, stage, first.model)
    _check_fresh_process(case, edits, first, inputs, tmp_path)
    _check_cost(given, first, inputs)
    _check_export(first, task, tmp_path)
    for number in sorted({1, (saves + 1) // 2, saves} - {0}):
        resumed = _interrupted(stage, config, given, task, tmp_path / f"interrupted{number}", number)
        assert_same(first, resumed, f"going on after save {number} of {saves}")
    return first


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict, byte for byte."""
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}


def logits_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Logits of every head."""
    with torch.no_grad():
        return model.all_logits(*inputs) if isinstance(model, MultiExit) else [model(*inputs)]


def assert_same(one: StageResult, other: StageResult, what: str) -> None:
    """Same bits of the model, same edit, same metrics."""
    here, there = bits(one.model), bits(other.model)
    assert here.keys() == there.keys(), what
    different = [name for name in here if here[name] != there[name]]
    assert not different, f"{what} gives other bits in {different[:3]}"
    assert dict(one.edit.data) == dict(other.edit.data), what
    assert one.edit.tensors.keys() == other.edit.tensors.keys(), what
    assert all(torch.equal(one.edit.tensors[k], other.edit.tensors[k]) for k in one.edit.tensors), what
    assert pretty_json(one.metrics) == pretty_json(other.metrics), what


class Interrupted(Exception):
    """Stands for a kill."""


class _Context(FolderContext):
    """Counts saves, and dies right after the `stop`-th."""

    saves = 0
    stop: int | None = None

    def save(self, name: str, state: State) -> None:
        super().save(name, state)
        self.saves += 1
        if self.saves == self.stop:
            raise Interrupted


class _Splits(Mapping[Any, Split]):
    """All splits of a task are there, as in a run; those that are not `readable` cannot be read."""

    def __init__(self, splits: Mapping[Any, Split], readable: Collection[str]) -> None:
        self._splits, self._readable = splits, readable

    def __getitem__(self, name: Any) -> Split:
        split = self._splits[name]
        assert name in self._readable, f"the stage reads the split {name!r} and declares {sorted(self._readable)}"
        return split

    def __contains__(self, name: Any) -> bool:
        return name in self._splits

    def __iter__(self) -> Iterator[Any]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


class _Declared:
    """A task of which a stage reads what its configuration needs, and never `test`."""

    def __init__(self, task: Task, stage: Stage[Any], config: StageConfig) -> None:
        needed = stage.needed_splits(config)
        assert set(needed) <= set(stage.splits), "needed_splits names a split that the stage does not declare"
        assert "test" not in stage.splits
        self._task = task
        self.splits = _Splits(task.splits, needed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def _fit(
    stage: Stage[Any], config: StageConfig, given: nn.Module, task: Task, folder: Path, torch_seed: int
) -> tuple[StageResult, int]:
    context = _Context(folder, seed=7)
    torch.manual_seed(torch_seed)  # whatever a stage draws comes from its context
    result = stage.fit(copy.deepcopy(given), _Declared(task, stage, config), config, context)
    return result, context.saves


def _interrupted(
    stage: Stage[Any], config: StageConfig, given: nn.Module, task: Task, folder: Path, stop: int
) -> StageResult:
    dying = _Context(folder, seed=7)
    dying.stop = stop
    try:
        stage.fit(copy.deepcopy(given), _Declared(task, stage, config), config, dying)
    except Interrupted:
        return _fit(stage, config, given, task, folder, torch_seed=3)[0]
    raise AssertionError(f"the stage never came to save {stop}")


def _model_before(case: StageCase, task: Task, tmp_path: Path) -> tuple[nn.Module, list[Edit]]:
    model, edits = case.model(), []
    for position, (name, fields) in enumerate(case.prior):
        stage = stage_named(name)
        result = stage.fit(model, task, stage.config(**fields), FolderContext(tmp_path / f"prior{position}", 5))
        model = result.model
        edits.append(result.edit)
    return model, edits


def _check_result(case: StageCase, result: StageResult) -> None:
    assert result.edit.stage == case.stage
    assert not any(module.training for module in result.model.modules()), "the model is in training mode"
    for name, value in result.model.state_dict().items():
        assert value.device.type == "cpu", name
        assert torch.isfinite(value).all(), name
    assert json.loads(pretty_json(result.metrics)) is not None
    for name, value in result.artifacts.items():
        assert isinstance(value, Tensor), name


def _check_export(result: StageResult, task: Task, tmp_path: Path) -> None:
    """The bundle is proven against PyTorch on every exit, and stores no weight more often than PyTorch does."""
    manifest = export_bundle(result.model, task, tmp_path / "bundle", parity_rows=32).manifest
    parity, ledger = manifest.parity, manifest.ledger
    assert parity.max_abs_diff <= 1e-4
    decides = any(kind_of(spec).decides for spec in manifest.answers)
    assert (parity.label_agreement, parity.exit_agreement) == (1.0 if decides else None, 1.0)
    assert parity.exits_covered == parity.exits_total
    assert ledger.stored_weight_bytes <= ledger.torch_unique_bytes + 1024
    assert dict(ledger.shared) == shared_bases(result.model)


def _check_edit(edit: Edit, given: nn.Module, stage: Stage[Any], fitted: nn.Module) -> None:
    """The edit is JSON, and enough to make the structure out of the model that the stage was given."""
    travelled = json.loads(json.dumps(edit.data))
    rebuilt = stage.rebuild(copy.deepcopy(given), Edit(edit.stage, travelled, edit.tensors))
    here = {name: value.shape for name, value in fitted.state_dict().items()}
    there = {name: value.shape for name, value in rebuilt.state_dict().items()}
    assert here == there
    assert sharing(rebuilt) == sharing(fitted)


def sharing(model: nn.Module) -> list[tuple[str, ...]]:
    """Names that mean the same tensor, for every tensor with several."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict().items():
        groups.setdefault(value.data_ptr(), []).append(name)
    return sorted(tuple(names) for names in groups.values() if len(names) > 1)


def _check_fresh_process(
    case: StageCase, edits: list[Edit], result: StageResult, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, case.base, [*edits, result.edit], result.model, result.metrics, root=TESTS)
    expected = logits_of(result.model, inputs)
    logits = logits_in_a_fresh_process(folder, TESTS, inputs)
    assert len(logits) == len(expected)
    for here, there in zip(expected, logits, strict=True):
        assert here.numpy().tobytes() == there.tobytes(), "a fresh process computes other logits"


def _check_cost(given: nn.Module, result: StageResult, inputs: tuple[Tensor, ...]) -> None:
    """MACs and parameters fall, or a note names the one that does not: a note about something else says nothing."""
    before, after = count(given, inputs), count(result.model, inputs)
    for figure, old, new in (
        ("MACs", before.macs, after.macs),
        ("parameters", before.parameters, after.parameters),
    ):
        named = [note for note in result.notes if re.search(rf"\b{figure}\b", note)]
        assert new < old or named, f"{figure} go from {old} to {new}, and no note of {list(result.notes)} names them"
