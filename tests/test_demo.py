"""The demo's recipe reaches what its `require` section and the issue ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICKLY = ("--set", "control=null", "--set", "benchmark.enabled=false")


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgewright_launch", "run", "demo", "--out", str(tmp_path), *QUICKLY],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    summary, parity = report["summary"], report["parity"]
    assert summary["accuracy_change"] >= -0.015
    assert summary["macs_reduction"] >= 4
    assert summary["bytes_reduction"] >= 6
    assert parity["max_abs_diff"] <= 1e-4
    assert parity["rows"] == report["task"]["test_rows"]
    assert parity["exits_covered"] == parity["exits_total"] == 4
    assert (parity["label_agreement"], parity["exit_agreement"]) == (1.0, 1.0) or parity["excused"]
    exits = next(section["data"] for section in report["sections"] if section["stage"] == "early_exit")
    assert all(row["share"] > 0 for row in exits["table"])
    assert any(len(users) >= 2 for users in report["ledger"]["shared"].values())
