"""What pruning may cost: the floors that an iteration must not break."""

from __future__ import annotations

from ...metric import Score, within
from ...quality_drop import measured_drop
from ...task import Task
from .config import ClassAwarePruningConfig


def broken_floor(task: Task, baseline: Score, quality: Score, config: ClassAwarePruningConfig) -> str | None:
    """Which floor does not hold, None if all do.

    Args:
        task: metric and names of the classes.
        baseline: quality on validation before pruning.
        quality: and after.
        config: `max_drop` and `max_worst_class_drop`.
    """
    if not within(task.metric, baseline.value, quality.value, config.max_drop):
        return f"{task.metric.name} below the floor{measured_drop(task.metric, baseline, quality)}"
    before, after = baseline.worst_class_accuracy, quality.worst_class_accuracy
    worst = config.max_worst_class_drop
    if worst is None or before is None or after is None or after >= before - worst - 1e-9:
        return None
    place = quality.per_class.index(after)
    had = baseline.per_class[place]
    return (
        f"class {task.labels[place]!r} below the floor: {after:.4f} of it right, before "
        f"{'none' if had is None else f'{had:.4f}'}, and {before:.4f} of the worst class then"
    )
