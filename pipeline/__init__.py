"""Compress, export and measure a PyTorch model: `run(recipe, out)` and the contracts that stages and tasks fulfil.

Names are imported when they are first used, so that ``edgewright --help`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, read_checkpoint
    from .context import FolderContext
    from .image_classification import ImageClassification
    from .metric import Metric, Score
    from .recipe import Recipe, load_recipe, parse_recipe
    from .runner import RunResult, run
    from .splits import DatasetSplit, TensorSplit
    from .stage import Context, Edit, Stage, StageConfig, StageResult
    from .task import Batch, Split, Task
    from .training import TrainingConfig

_WHERE = {
    "Batch": "task",
    "Context": "stage",
    "DatasetSplit": "splits",
    "Edit": "stage",
    "FolderContext": "context",
    "ImageClassification": "image_classification",
    "Metric": "metric",
    "Recipe": "recipe",
    "RunResult": "runner",
    "Score": "metric",
    "Split": "task",
    "Stage": "stage",
    "StageConfig": "stage",
    "StageResult": "stage",
    "Task": "task",
    "TensorSplit": "splits",
    "TrainingConfig": "training",
    "load_checkpoint": "checkpoint",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "read_checkpoint": "checkpoint",
    "run": "runner",
}

__all__ = [
    "Batch",
    "Context",
    "DatasetSplit",
    "Edit",
    "FolderContext",
    "ImageClassification",
    "Metric",
    "Recipe",
    "RunResult",
    "Score",
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
