"""The same examples each time, and one thread.

Tiny models gain nothing from threads, and lose a lot where several tests or builds share the cores.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import simplifier_server
import torch
from torch.onnx._internal.exporter import _registration

from edgewright.export.graph import simplify

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end one of them would run while the other cores wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def one_simplifier() -> Iterator[None]:
    """See `simplifier_server`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplify, "_run", simplifier_server.run)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_operator_table() -> Iterator[None]:
    """torch's exporter parses its whole operator library at every export, a quarter of the time; here once."""
    build = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def copied(*arguments: Any, **named: Any) -> _registration.ONNXRegistry:
        built = build(*arguments, **named)
        table = copy.copy(built)
        table.functions = {target: list(found) for target, found in built.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield
