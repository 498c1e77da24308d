"""Who knows whom: a shared room finds stages through the registry, and names none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgewright import edge_runtime, export, pipeline
from edgewright.pipeline.stage_registry import SHIPPED

PIPELINE = Path(pipeline.__file__ or "").parent
ROOMS = [
    *(PIPELINE / room for room in ("recipe", "runs", "report", "store", "tasks", "training", "analysis", "cli.py")),
    *(PIPELINE / file for file in ("section.py", "stage.py", "task.py", "metric.py", "sources.py")),
    Path(export.__file__ or "").parent,
    Path(edge_runtime.__file__ or "").parent,
]
NAMES = re.compile(rf"\b({'|'.join(name for name in SHIPPED if name != 'train')})\b")
"""`train` is the name of a split as well."""
TRAIN = re.compile(r"""(stage_named|StageEntry)\([^)]*["']train["']|name *== *["']train["']|name *!= *["']train["']""")


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_shared_room_names_no_stage(room: Path) -> None:
    files = [room] if room.is_file() else [f for f in room.rglob("*") if f.suffix in (".py", ".j2")]
    assert files
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            named = None if "docs/" in line else NAMES.search(line) or TRAIN.search(line)
            assert named is None, f"{file.name}, line {number} names {named[0] if named else None}: {line.strip()}"
