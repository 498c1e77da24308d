from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
from pydantic import ValidationError

from edgewright.edge_runtime.bundle.manifest import Manifest
from edgewright.edge_runtime.errors import ExportError
from edgewright.edge_runtime.targets.target import target_named
from edgewright.export import ExportOptions
from edgewright.export.target import held_to


@dataclass(frozen=True)
class _Versions:
    """What `held_to` reads of a manifest."""

    opset: int
    ir_version: int
    notes: tuple[str, ...] = ("first",)


def _manifest(opset: int, ir_version: int) -> Manifest:
    return cast(Manifest, _Versions(opset, ir_version))


def test_a_file_that_the_target_reads_gets_a_note() -> None:
    held = held_to("x86", _manifest(20, 10))
    assert held.notes[0] == "first" and "'x86'" in held.notes[1] and "opset 20" in held.notes[1]
    assert held_to(None, _manifest(99, 99)).notes == ("first",)


@pytest.mark.parametrize(("opset", "ir_version", "what"), [(22, 10, "opset 22"), (21, 11, "IR version 11")])
def test_a_file_that_the_target_does_not_read_is_refused(opset: int, ir_version: int, what: str) -> None:
    with pytest.raises(ExportError, match=f"{what}.*1.18.*'x86'.*export.opset"):
        held_to("x86", _manifest(opset, ir_version))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"target": "x86_vni"}, "did you mean 'x86_vnni'"), ({"target": "x86", "opset": 22}, "take 21 or less")],
)
def test_options_that_no_target_can_meet_are_refused_before_any_compute(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ExportOptions(**options)
    assert ExportOptions(target="x86", opset=target_named("x86").opset).target == "x86"
