"""Compress, export and measure a PyTorch model: `run(recipe, out)` and the contracts that stages and tasks fulfil.

Names are imported when they are first used, so that ``edgewright --help`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .metric import Metric, Score
    from .recipe.recipe import Recipe, load_recipe, parse_recipe
    from .report.result import RunResult
    from .runs.runner import run
    from .stage import Context, Edit, Stage, StageConfig, StageResult
    from .store.checkpoint import load_checkpoint, read_checkpoint
    from .store.context import FolderContext
    from .task import Batch, Split, Task
    from .tasks.detection import Detection
    from .tasks.image_classification import ImageClassification
    from .tasks.multilabel import MultiLabel
    from .tasks.regression import Regression
    from .tasks.segmentation import Segmentation
    from .tasks.splits import DatasetSplit, TensorSplit
    from .training.training import TrainingConfig

_WHERE = {
    "Batch": "task",
    "Context": "stage",
    "DatasetSplit": "tasks.splits",
    "Edit": "stage",
    "FolderContext": "store.context",
    "ImageClassification": "tasks.image_classification",
    "Metric": "metric",
    "Recipe": "recipe.recipe",
    "Regression": "tasks.regression",
    "RunResult": "report.result",
    "Score": "metric",
    "Detection": "tasks.detection",
    "MultiLabel": "tasks.multilabel",
    "Segmentation": "tasks.segmentation",
    "Split": "task",
    "Stage": "stage",
    "StageConfig": "stage",
    "StageResult": "stage",
    "Task": "task",
    "TensorSplit": "tasks.splits",
    "TrainingConfig": "training.training",
    "load_checkpoint": "store.checkpoint",
    "load_recipe": "recipe.recipe",
    "parse_recipe": "recipe.recipe",
    "read_checkpoint": "store.checkpoint",
    "run": "runs.runner",
}

__all__ = [
    "Batch",
    "Context",
    "DatasetSplit",
    "Detection",
    "Edit",
    "FolderContext",
    "ImageClassification",
    "Metric",
    "MultiLabel",
    "Recipe",
    "Regression",
    "RunResult",
    "Score",
    "Segmentation",
    "Split",
    "Stage",
    "StageConfig",
    "StageResult",
    "Task",
    "TensorSplit",
    "TrainingConfig",
    "load_checkpoint",
    "load_recipe",
    "parse_recipe",
    "read_checkpoint",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
