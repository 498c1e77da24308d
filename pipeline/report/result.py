"""What a run leaves behind: the result that `run` returns, and the names of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgewright.edge_runtime.bundle.manifest import Manifest
from edgewright.edge_runtime.measure.paired import Drop

from ..recipe.recipe import Recipe
from ..stage import Json
from .steps import StepRow

RESOLVED_FILE, BUNDLE_FOLDER = "recipe.resolved.yaml", "bundle"


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        out: the run's folder.
        recipe: as it ran.
        steps: the base model and every stage, in order.
        reference: id of the step that stands for the uncompressed model: the base, or the last of the
            trainings that the recipe begins with.
        bundle: the last step's bundle.
        manifest: what that says.
        bundles: bundle of every step that was exported, by step id.
        measurements: rows of `edge_runtime.bench`, each with a ``step``.
        report: report.json; None before it is written.
        controls: ids of steps that are no part of the chain, but stand beside it for comparison.
        comparison: latency of the last step against the reference, measured interleaved; None if not
            measured.
        drops: by step how much worse its quality is than the reference's, on the same test rows and with an interval;
            without the steps that have none, because the task is another or its metric is not made of rows.
        accuracy_drop: the same of the last step's accuracy; None where rows are not right or wrong.
    """

    out: Path
    recipe: Recipe
    steps: tuple[StepRow, ...]
    reference: str
    bundle: Path
    manifest: Manifest
    bundles: Mapping[str, Path]
    measurements: tuple[Mapping[str, Json], ...] = ()
    report: Path | None = None
    controls: tuple[str, ...] = ()
    comparison: Mapping[str, Json] | None = None
    drops: Mapping[str, Drop] = field(default_factory=dict)
    accuracy_drop: Drop | None = None
