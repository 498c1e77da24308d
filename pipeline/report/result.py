"""What a run leaves behind: the result that `run` returns, and the names of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgewright.edge_runtime.bundle.manifest import Manifest

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
