"""What a run works on, once `preparation` has found nothing wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..recipe.recipe import Recipe
from ..stage import Json
from ..store.cache import Key
from ..store.checkpoint import BaseSpec
from ..task import Task
from .watch import Watch


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        recipe: checked.
        device: where stages compute.
        task: data, loss and metric.
        tasks: the task before all stages, and after each: with fewer classes behind a stage that keeps only some.
        base: the model before all stages.
        base_key: its key.
        base_sources: sha256 of the files that define the base, by portable name.
        environment: versions and the like, part of every key.
        watch: of the files that the keys speak of.
        folds: whether something can be folded in the base, see `models.sources.folding`.
    """

    recipe: Recipe
    device: torch.device
    task: Task
    tasks: tuple[Task, ...]
    base: BaseSpec
    base_key: Key
    base_sources: Mapping[str, str]
    environment: dict[str, Json]
    watch: Watch
    folds: bool = False
