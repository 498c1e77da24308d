"""What a mix of exits costs, and when exits pay, by hand; and the command that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgewright.pipeline.cli import main
from edgewright.pipeline.errors import InputError
from edgewright.pipeline.stages.early_exit.mix import break_even, break_even_text, expected, mix_cost, mix_of_report

EXITS = {
    "table": [
        {"name": "a", "share": 0.5, "p50_ms": 1.0, "macs": 10},
        {"name": "b", "share": 0.25, "p50_ms": 2.0, "macs": 20},
        {"name": "end", "share": 0.25, "p50_ms": 5.0, "macs": 40},
    ],
    "cost": {"plain_ms": 4.0},
}
REPORT = {"sections": [{"stage": "train", "data": {}}, {"stage": "early_exit", "data": EXITS}]}


def test_a_report_of_the_first_version_is_read_too() -> None:
    assert mix_of_report({"exits": EXITS}, None, None) == mix_of_report(REPORT, None, None)


def test_a_mix_by_hand() -> None:
    cost = mix_of_report(REPORT, None, None)
    assert cost.expected_ms == 0.5 * 1 + 0.25 * 2 + 0.25 * 5
    assert cost.expected_macs == 0.5 * 10 + 0.25 * 20 + 0.25 * 40
    # early rows take 4/3 ms, deep ones 5: with x early rows x * 4/3 + (1 - x) * 5 = 4
    assert cost.break_even == pytest.approx(1 / (5 - 4 / 3))
    other = mix_of_report(REPORT, [1, 0, 3], {"exits": [500.0, 600.0, 4500.0]})
    assert other.mix == (0.25, 0.0, 0.75)
    assert other.expected_ms == pytest.approx(0.25 * 0.5 + 0.75 * 4.5)
    share = other.break_even
    assert share is not None and expected([share, 0.0, 1 - share], [0.5, 0.6, 4.5]) == pytest.approx(4.0)


def test_what_was_not_measured_is_not_made_up() -> None:
    assert expected([0.5, 0.0, 0.5], [1.0, None, 3.0]) == 2.0
    assert expected([0.5, 0.1, 0.4], [1.0, None, 3.0]) is None
    assert break_even([0.5, 0.5], [1.0, 3.0], None) is None
    assert break_even([0.0, 1.0], [1.0, 3.0], 2.0) is None, "nobody leaves early"
    assert break_even([0.5, 0.5], [1.0, 3.0], 3.5) == 0.0
    assert break_even([0.5, 0.5], [3.0, 3.0], 2.0) == 2.0, "never"
    assert mix_cost([0.5, 0.5], [None, 3.0], 2.0, [1, 2]).expected_macs == 1.5
    for mix, latency, plain, why in (
        ([0.0, 1.0], [1.0, 3.0], 2.0, "no row of this mix leaves early"),
        ([0.5, 0.5], [1.0, 3.0], None, "the network without exits was not measured"),
        ([1.0, 0.0], [1.0, None], 2.0, "no measured row went to the network's end"),
    ):
        assert why in break_even_text(mix_cost(mix, latency, plain, [1, 2]))


def test_the_command_costs_any_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert main(["mix", str(tmp_path), "--shares", "0.8,0.1,0.1"]) == 0
    told = capsys.readouterr().out
    assert "a 80.0%, b 10.0%, end 10.0%" in told and "expected latency: 1.5 ms, without exits 4 ms (x0.38)" in told
    assert "break-even: below 25.7% of the rows" in told
    for arguments, message in (
        ([str(tmp_path), "--shares", "0.5,0.5"], "a mix is 3 numbers"),
        ([str(tmp_path), "--shares", "half"], "no list of numbers"),
        ([str(tmp_path / "nowhere")], "cannot be read"),
    ):
        assert main(["mix", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="without exits"):
        mix_of_report({"sections": []}, None, None)
