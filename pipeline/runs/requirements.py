"""What a result must fulfil; checked when everything is written, so that a miss costs no finished work."""

from __future__ import annotations

from collections.abc import Mapping

from edgewright.edge_runtime.measure.paired import Drop

from ..errors import QualityFloorError
from ..quality_drop import drop_text
from ..recipe.recipe import Requirements
from ..stage import Json
from ..stage_registry import requirements

_DECIMAL = 1e-9  # 0.95 - 0.94 is a little more than 0.01


def check_requirements(report: Mapping[str, Json], wanted: Requirements) -> None:
    """Holds a report to what the recipe requires.

    Args:
        report: the content of report.json.
        wanted: see `Requirements`.

    Raises:
        QualityFloorError: lists everything that is missed, with the figure that was reached.
    """
    summary = report["summary"]
    missed: list[str] = []
    change = summary["accuracy_change"]
    if wanted.max_accuracy_drop is not None and (change is None or -change > wanted.max_accuracy_drop):
        fell = "the task has no accuracy" if change is None else f"test accuracy fell by {-change:.4f}"
        if summary.get("accuracy_drop"):
            fell += f" ({drop_text(Drop(**summary['accuracy_drop']))})"
        missed.append(f"{fell}, allowed {wanted.max_accuracy_drop:g}")
    worse = summary.get("quality_drop")
    if wanted.max_drop is not None and (worse is None or worse > wanted.max_drop + _DECIMAL):
        fell = (
            "the reference was judged on other samples" if worse is None else f"the drop of the metric is {worse:.4g}"
        )
        if worse is not None and summary.get("drop"):
            fell += f" ({drop_text(Drop(**summary['drop']))})"
        missed.append(f"{fell}, max_drop allows {wanted.max_drop:g}")
    for name, least in (("macs_reduction", wanted.macs_reduction), ("bytes_reduction", wanted.bytes_reduction)):
        if least is not None and (summary[name] is None or summary[name] < least):
            reached = "not defined" if summary[name] is None else f"{summary[name]:.3f}"
            missed.append(f"{name} is {reached}, required {least:g}")
    if wanted.of_stages:
        known = requirements()
        for name in wanted.of_stages:
            missed += known[name][1].missed(report)
    if missed:
        raise QualityFloorError(
            f"the run is finished, and misses what the recipe requires: {'; '.join(missed)}. "
            "Results and report are written; change the stages, or what `require` asks for"
        )
