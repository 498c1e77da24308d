"""Class-based early exit (METHODS §2, arXiv 2309.13443): heads exclude classes; when one is left, the row leaves."""

from __future__ import annotations

from .config import EarlyExitConfig
from .stage import STAGE, fit, rebuild

__all__ = ["STAGE", "EarlyExitConfig", "fit", "rebuild"]
