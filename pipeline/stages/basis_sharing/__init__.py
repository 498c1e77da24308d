"""Basis sharing (METHODS §3, arXiv 2410.03765): weight matrices of several layers share one basis."""

from __future__ import annotations

from .config import BasisSharingConfig
from .stage import STAGE, fit, rebuild

__all__ = ["STAGE", "BasisSharingConfig", "fit", "rebuild"]
