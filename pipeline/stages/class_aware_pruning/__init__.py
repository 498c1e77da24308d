"""Class-aware pruning (METHODS §1, arXiv 2312.05875): filters that few classes need go, step by step."""

from __future__ import annotations

from .config import ClassAwarePruningConfig
from .criteria import CRITERIA
from .criterion import Criterion
from .stage import STAGE, fit, rebuild

__all__ = ["CRITERIA", "STAGE", "ClassAwarePruningConfig", "Criterion", "fit", "rebuild"]
