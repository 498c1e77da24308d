"""Fixtures of the export's tests."""

from __future__ import annotations

import pytest
from tiny import tiny_task


@pytest.fixture(scope="session")
def task():
    return tiny_task(rows={"train": 16, "calibration": 16, "validation": 16, "test": 24})
