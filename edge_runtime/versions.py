"""Versions of what results depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Python's version, and that of each of `distributions` that is installed; the others are left out."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
