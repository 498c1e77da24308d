"""The tasks that ship, one module each, and `build_task` that makes a task by name."""

from .registry import available, build_task, task_sources

__all__ = ["available", "build_task", "task_sources"]
