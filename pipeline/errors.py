"""The errors of the host side; the tree begins in `edgewright.edge_runtime.errors`.

::

    InputError                      exit code 2
    ├── RecipeError                     a recipe that cannot be read, or an unknown key
    │   └── StageOrderError             stages in an order that cannot work
    ├── ModelError                      an unknown model, or weights that do not fit it
    ├── DataError                       data missing, corrupt, NaN, overlapping, or a class without samples
    ├── CheckpointError                 a checkpoint that is damaged, or made from other sources
    ├── EditedSourceError               a file that a run depends on was edited while it was at work
    └── OutputError                     a place that cannot be written
    QualityFloorError               exit code 4
    └── StageError                  exit code 4, a stage that cannot do its work on this model
"""

from __future__ import annotations

from edgewright.edge_runtime.errors import (
    BundleError,
    EdgewrightError,
    ExportError,
    InputError,
    ParityError,
    ProviderError,
    QualityFloorError,
)

__all__ = [
    "BundleError",
    "CheckpointError",
    "DataError",
    "EdgewrightError",
    "EditedSourceError",
    "ExportError",
    "InputError",
    "ModelError",
    "OutputError",
    "ParityError",
    "ProviderError",
    "QualityFloorError",
    "RecipeError",
    "StageError",
    "StageOrderError",
]


class RecipeError(InputError):
    """A recipe cannot be read, has an unknown key or a value that does not fit."""


class StageOrderError(RecipeError):
    """The stages stand in an order that cannot work."""


class ModelError(InputError):
    """A model is unknown, cannot be built, or its weights do not fit."""


class DataError(InputError):
    """Data is missing, corrupt, not finite, overlapping between splits, or lacks a class."""


class CheckpointError(InputError):
    """A checkpoint is damaged or belongs to other sources."""


class EditedSourceError(InputError):
    """A source, weights or data file was edited while a run was at work."""


class OutputError(InputError):
    """The place for results cannot be written."""


class StageError(QualityFloorError):
    """A stage cannot do what it was asked to do on this model and data."""
